"""Two machines for real, as two network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"
WAITING = 20  # seconds that processes wait for one another in this test, for half an hour
NODES = {"dino-a": "10.213.7.1", "dino-b": "10.213.7.2"}  # namespaces and their addresses
CABLES = {"dino-a": "dino-cable-a", "dino-b": "dino-cable-b"}

pytestmark = pytest.mark.slow


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def unplug() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], capture_output=True)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need the command ip and root")
    unplug()
    try:
        for node in NODES:
            ip("netns", "add", node)
        first, second = CABLES.values()
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for node, address in NODES.items():
            ip("link", "set", CABLES[node], "netns", node)
            ip("-n", node, "addr", "add", f"{address}/24", "dev", CABLES[node])
            ip("-n", node, "link", "set", CABLES[node], "up")
            ip("-n", node, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        unplug()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    yield
    unplug()


def values(data: tuple[Path, Path], output: Path) -> list[str]:
    """Without anything that is drawn for each process by itself."""
    length = ["SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "(10,)", "SOLVER.CHECKPOINT_PERIOD", "4"]
    plain = [
        "SOLVER.BACKBONE_MULTIPLIER",
        "0.0",
        "INPUT.MIN_SIZE_TRAIN",
        "[64]",
        "DATASETS.TEST",
        "()",
        "MODEL.DINO.DN.TYPE",
        "none",
    ]
    return [*config_values(data, output, "two_nodes"), *length, *plain]


def script(folder: Path, then: str = "") -> Path:
    """tools/train_net.py, with little patience; `then` is what a process does after a step."""
    path = folder / "train.py"
    path.write_text(
        "import os, sys, time\n"
        "from datetime import timedelta\n"
        "from dino_d2.engine import run\n"
        "from dino_d2.tools.train_net import parse\n"
        "from dino_d2.engine import DINOTrainer, processes\n"
        f"processes.TIMEOUT = timedelta(seconds={WAITING})\n"
        "class Trainer(DINOTrainer):\n"
        "    @classmethod\n"
        "    def build_model(cls, cfg):\n"
        "        return super().build_model(cfg).double()\n"  # Adam makes steps of gradients that are mere roundings
        "    def after_step(self):\n"
        "        super().after_step()\n"
        f"        {then or 'pass'}\n"
        "run.DINOTrainer = Trainer\n"
        "processes.run_in_every_process(run.train_or_evaluate, parse(sys.argv[1:]))\n"
    )
    return path


def start(node: str, output: Path, *command: str) -> subprocess.Popen:
    """What it says goes to `output`: nobody reads a pipe while the run goes on."""
    rank, (first, *_) = list(NODES).index(node), NODES.values()
    options = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--rdzv-id", output.stem]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29511", "--local-addr", NODES[node]]
    # Which machine keeps the list of all is known by its name elsewhere; both have the same one here.
    options += ["--rdzv-conf", f"is_host={int(rank == 0)},join_timeout={3 * WAITING},read_timeout={WAITING}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLES[node]}
    with open(output, "w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", node, sys.executable, "-m", "torch.distributed.run", *options, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def start_both(folder: Path, run: str, *command: str) -> dict[Path, subprocess.Popen]:
    """By the files of what they say."""
    return {path: start(node, path, *command) for node in NODES for path in [folder / f"{run}.{node}"]}


def train(folder: Path, run: str, *command: str) -> str:
    """What both nodes said; they must succeed."""
    for path, process in start_both(folder, run, *command).items():
        assert process.wait(timeout=300) == 0, path.read_text()[-3000:]
    return "".join((folder / f"{run}.{node}").read_text() for node in NODES)


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_two_nodes_train_as_one_process_and_survive_a_cut_cable(two_nodes: None, tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=6, size=64)
    arguments = ["--config-file", str(RECIPE), "--resume"]
    alone = subprocess.run(
        [sys.executable, str(script(tmp_path)), *arguments, *values(data, tmp_path / "alone")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    train(tmp_path, "whole", str(script(tmp_path)), *arguments, *values(data, tmp_path / "whole"))
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "alone")
    for name in theirs:
        if theirs[name].is_floating_point():
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9, msg=name)

    slow = script(tmp_path, then="time.sleep(0.5)")  # time to find the cable
    both = start_both(tmp_path, "cut", str(slow), *arguments, *values(data, tmp_path / "cut"))
    wait_until((tmp_path / "cut" / "last_checkpoint").exists, 120)
    ip("-n", "dino-b", "link", "set", CABLES["dino-b"], "down")
    for path in both:
        wait_until(lambda path=path: "Timed out waiting" in path.read_text(), 3 * WAITING)
    for process in both.values():  # torchrun itself waits five minutes for a store that it cannot reach
        process.kill()
        process.wait()
    ip("-n", "dino-b", "link", "set", CABLES["dino-b"], "up")

    said = train(tmp_path, "again", str(script(tmp_path)), *arguments, *values(data, tmp_path / "cut"))
    assert "Starting training from iteration 4" in said
    resumed = weights(tmp_path / "cut")
    assert all(torch.equal(resumed[name], ours[name]) for name in ours)
