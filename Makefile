# `make demo` and `make test` are complete by themselves: each sets the environment up first.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# PyTorch takes one thread in tests. The tests of a file share what they make, so they stay together.
IN_PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile
# detectron2 imports a part of torch that is to go; its users can do nothing about it.
export PYTHONWARNINGS := ignore::FutureWarning

.PHONY: setup test test-all demo site dist lint format clean cuda-all torch-headers gpu-wheels

setup:
	@$(PYTHON) dev/setup_env.py

test: setup lint
	$(VENV_PYTHON) -m pytest $(IN_PARALLEL)

# With the tests that take minutes or need unusual means (root, for two machines in network namespaces).
test-all: setup lint
	$(VENV_PYTHON) -m pytest $(IN_PARALLEL) -m "slow or not slow"

demo: setup
	$(VENV_PYTHON) dev/run_demo.py

# The documentation with the Python API, in output/site.
site: setup
	$(VENV_PYTHON) -m mkdocs build --strict

# Build sdist and wheel, and try both in a new environment; nothing is published.
dist: setup
	$(VENV_PYTHON) dev/try_dist.py

lint:
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format:
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

# Compile the CUDA kernels for every architecture; no GPU is needed.
cuda-all: setup
	$(VENV_PYTHON) dev/cuda_report.py

# Compile the op against the headers of older versions of PyTorch.
torch-headers: setup
	$(VENV_PYTHON) dev/check_torch_headers.py

# What dev/gpu_check.sh needs on a machine with a GPU and without a network.
gpu-wheels: setup
	dev/gpu_wheels.sh

clean:
	rm -rf .venv build dist *.egg-info ops/_C*.so
