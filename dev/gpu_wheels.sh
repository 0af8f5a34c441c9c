#!/usr/bin/env bash
# Collect, where there is a network, what dev/gpu_check.sh needs on a machine with a GPU and without one: the wheels
# that a Python 3.12 with PyTorch lacks, and the peers of the benchmark. `make gpu-wheels`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
folder=build/gpu-wheels
rm -rf "$folder" && mkdir -p "$folder"

pure=(fvcore==0.1.5.post20221221 "iopath>=0.1.9,<0.2" antlr4-python3-runtime==4.9.3)
# huggingface_hub, for timm: the last that brings no web client of its own along.
ready=("omegaconf>=2.1,<2.4" "hydra-core>=1.1,<2" yacs termcolor tabulate cloudpickle tqdm portalocker pyyaml timm
  "huggingface_hub<1" requests urllib3 certifi charset_normalizer idna safetensors "pycocotools>=2.0.8,<3" pytest
  iniconfig pluggy packaging pygments deformops==3.0.1)
"$python" -m pip wheel -q --no-deps -w "$folder" "${pure[@]}"
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  -d "$folder" "${ready[@]}"
"$python" -m pip download -q --no-deps --no-binary=:all: --no-build-isolation -d "$folder" torch-ms-deform-attn==0.1.1
# As dev/setup_env.py left it: without the wheel's own binary and its top-level `tools`.
site=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
tar -czf "$folder/detectron2.tar.gz" --exclude='__pycache__' -C "$site" detectron2

du -sh "$folder"
if [ "$(du -sm "$folder" | cut -f1)" -ge 64 ]; then
  echo "more than 64 MiB" >&2
  exit 1
fi
