"""Two processes on one machine without GPUs do what one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from dino_d2 import load_config
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"


def make_model(folder: Path) -> nn.Module:
    values = config_values((folder, folder), folder, "unused")
    torch.manual_seed(0)
    return build_model(load_config(str(RECIPE), [*values, "MODEL.DINO.DN.TYPE", "none"])).double()


def torchrun(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def in_parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("parallel")
    result = torchrun("tests/engine/in_parallel.py", str(folder))
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(folder / "in_parallel.pth", weights_only=True), folder


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["objects", "a process without any"])
def test_gradients_are_those_of_the_whole_batch(in_parallel: tuple[dict, Path], name: str, parts: int) -> None:
    from tests.engine.in_parallel import CASES, gradients

    found, folder = in_parallel
    expected = gradients(CASES[name], 1, folder)
    assert found["gradients"][name, parts].keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in found["gradients"][name, parts].items():
        assert (gradient - expected[key]).abs().max() <= 1e-9 * largest, key


def test_every_parameter_gets_a_gradient_without_any_object(in_parallel: tuple[dict, Path]) -> None:
    gradients = in_parallel[0]["gradients"]
    assert gradients["nothing at all", 1].keys() == gradients["objects", 1].keys()
    assert all(gradient.isfinite().all() for gradient in gradients["nothing at all", 2].values())


def test_boxes_are_counted_over_all_processes(in_parallel: tuple[dict, Path]) -> None:
    assert in_parallel[0]["boxes"] == 4.5


def ap_of(output: str) -> list[str]:
    return re.findall(r"copypaste: ((?:[\d.]+,)+[\d.]+)", output)


def test_training_and_gathered_evaluation(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=5, size=64)
    values = [*config_values(data, tmp_path / "run", "parallel"), "INPUT.MIN_SIZE_TRAIN", "[64]"]
    trained = torchrun(
        "tools/train_net.py",
        "--config-file",
        str(RECIPE),
        *values,
        "SOLVER.MAX_ITER",
        "20",
        "SOLVER.IMS_PER_BATCH",
        "4",
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    alone = subprocess.run(
        [sys.executable, "tools/train_net.py", "--config-file", str(RECIPE), "--eval-only", *values, *weights],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert ap_of(trained.stdout) == ap_of(alone.stdout) != []


def test_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1:\n"
        "    raise MemoryError('of process 1')\n"
        "dist.all_reduce(torch.zeros(1))\n"
    )
    result = torchrun(str(script))
    assert result.returncode != 0
    assert "of process 1" in result.stderr


def test_detectron2_launches_the_processes_too(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    values = [*config_values(data, tmp_path / "run", "launched"), "INPUT.MIN_SIZE_TRAIN", "[64]"]
    values += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATASETS.TEST", "()"]
    script = tmp_path / "launched.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "from detectron2.engine import launch\n"
        "from train_net import main, parse\n"
        "if __name__ == '__main__':\n"
        "    launch(main, 2, dist_url='auto', args=(parse(sys.argv[1:]),))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), "--config-file", str(RECIPE), *values],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "model_final.pth").exists()
