"""Two processes on one machine without GPUs do what one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
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


def torchrun(*command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, *command)


def python(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
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


FAILING = """
import sys
import torch
from dino_d2.engine import run
from dino_d2.tools.train_net import parse
from detectron2.utils import comm
from detectron2.engine import launch
from dino_d2.engine import DINOTrainer
from dino_d2.engine.processes import run_in_every_process

class Failing(DINOTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        calls = []
        def hook(module, inputs, output):
            calls.append(1)
            {fault}
        model.neck.register_forward_hook(hook)
        return model

run.DINOTrainer = Failing
if __name__ == "__main__":
    {start}
"""
OUT_OF_MEMORY = "if comm.get_rank() == 1 and len(calls) == 2: raise torch.OutOfMemoryError('of process 1')"
# The loss of both is not finite; while it is reported one of them fails.
IN_THE_REPORT = (
    "if comm.get_rank() == 1 and len(calls) == 2: raise torch.OutOfMemoryError('of process 1')\n"
    "            return [level * float('nan') for level in output]"
)
TORCHRUN = "run_in_every_process(run.train_or_evaluate, parse(sys.argv[1:]))"
LAUNCH = "launch(run.train_or_evaluate, 2, dist_url='auto', args=(parse(sys.argv[1:]),))"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [OUT_OF_MEMORY, IN_THE_REPORT], ids=["in a step", "in a report"])
@pytest.mark.parametrize("start", [TORCHRUN, LAUNCH], ids=["torchrun", "launch"])
def test_process_that_fails_ends_the_others_with_its_message(tmp_path: Path, start: str, fault: str) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(fault=fault, start=start))
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    values = [*config_values(data, tmp_path / "run", "failing"), "INPUT.MIN_SIZE_TRAIN", "[64]"]
    values += ["SOLVER.MAX_ITER", "20", "DATASETS.TEST", "()", "SOLVER.ON_NON_FINITE", "skip"]
    arguments = [str(script), "--config-file", str(RECIPE), *values]
    begun = time.monotonic()
    result = torchrun(*arguments) if start == TORCHRUN else python(*arguments)
    assert result.returncode != 0
    assert "OutOfMemoryError: of process 1" in result.stderr + result.stdout
    assert time.monotonic() - begun < 120  # a process that waited for another would do so for half an hour


@pytest.mark.slow
def test_processes_that_would_start_at_different_places_do_not_start(tmp_path: Path) -> None:
    """As on two machines without a shared file system, the second of which has no checkpoint."""
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    values = [*config_values(data, tmp_path / "0", "apart"), "INPUT.MIN_SIZE_TRAIN", "[64]", "DATASETS.TEST", "()"]
    train = ["tools/train_net.py", "--config-file", str(RECIPE), "--resume"]
    first = torchrun(*train, *values, "SOLVER.MAX_ITER", "2")
    assert first.returncode == 0, first.stderr[-3000:]
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys\n"
        "from dino_d2.engine import choices, run\n"
        "from dino_d2.tools.train_net import parse\n"
        "from dino_d2.engine.processes import run_in_every_process\n"
        "shared = choices.Run.config\n"
        "def config(self):\n"
        "    cfg = shared(self)\n"
        f"    cfg.OUTPUT_DIR = {str(tmp_path)!r} + '/' + os.environ['RANK']\n"
        "    return cfg\n"
        "choices.Run.config = config\n"
        "run_in_every_process(run.train_or_evaluate, parse(sys.argv[1:]))\n"
    )
    second = torchrun(str(script), *train[1:], *values, "SOLVER.MAX_ITER", "4")
    assert second.returncode != 0
    assert "iteration: 2 in process 0, 0 in 1" in second.stderr
    assert "on a shared file system, or copy it to each machine" in second.stderr


@pytest.mark.slow
def test_training_goes_on_after_a_worker_was_killed(tmp_path: Path) -> None:
    """As after a preemption: torchrun starts all processes again, and --resume goes on to the same weights."""
    data = write_rectangles(tmp_path / "data", count=4, size=64)

    def command(output: Path) -> list[str]:
        values = [*config_values(data, output, "killed"), "INPUT.MIN_SIZE_TRAIN", "[64]", "DATASETS.TEST", "()"]
        values += ["SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "(10,)", "SOLVER.CHECKPOINT_PERIOD", "4"]
        return ["tools/train_net.py", "--config-file", str(RECIPE), "--resume", *values]

    whole = torchrun(*command(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    script = tmp_path / "killed.py"  # a worker that kills itself once, after the first checkpoint
    script.write_text(
        "import os, signal, sys\n"
        "from dino_d2.engine import run\n"
        "from dino_d2.tools.train_net import parse\n"
        "from dino_d2.engine import DINOTrainer\n"
        "from dino_d2.engine.processes import run_in_every_process\n"
        "class Killed(DINOTrainer):\n"
        "    def run_step(self):\n"
        "        super().run_step()\n"
        "        if (os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT'], self.iter) == ('1', '0', 5):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.DINOTrainer = Killed\n"
        "run_in_every_process(run.train_or_evaluate, parse(sys.argv[1:]))\n"
    )
    killed = torchrun(str(script), *command(tmp_path / "killed")[1:], options=("--max-restarts", "2"))
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert "Starting training from iteration 4" in killed.stdout
    ours, theirs = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"] for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_detectron2_launches_the_processes_too(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    values = [*config_values(data, tmp_path / "run", "launched"), "INPUT.MIN_SIZE_TRAIN", "[64]"]
    values += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATASETS.TEST", "()"]
    script = tmp_path / "launched.py"
    script.write_text(
        "import sys\n"
        "from dino_d2.engine.processes import run_in_every_process\n"
        "from dino_d2.engine.run import train_or_evaluate\n"
        "from dino_d2.tools.train_net import parse\n"
        "if __name__ == '__main__':\n"
        "    run_in_every_process(train_or_evaluate, parse(sys.argv[1:]))\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), "--config-file", str(RECIPE), "--num-gpus", "2", "--dist-url", "auto", *values],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "model_final.pth").exists()
