"""How often a training step waits for its device: each time, the device runs dry."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import dino_d2
from dino_d2 import load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from tests.synthetic import SameBatch, config_values, make_batch, write_rectangles

PACKAGE = Path(dino_d2.__file__).parent
RECIPE = Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml"

# What makes the host wait if the tensor is on a device: its numbers or their number are asked for.
READS = {
    getattr(Tensor, name)
    for name in ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal")
} | {torch.nonzero, torch.equal, torch.masked_select, Tensor.masked_select, torch.unique, Tensor.unique, torch.allclose}


class Reads(TorchFunctionMode):
    """Counts them by the file of dino_d2 that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        by_mask = func is Tensor.__getitem__ and _has_mask(args[1])
        if func in READS or by_mask:
            frame = sys._getframe(1)
            while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                frame = frame.f_back
            if frame is not None:
                self.found[Path(frame.f_code.co_filename).stem, func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


@pytest.fixture
def trainer(tmp_path: Path) -> DINOTrainer:
    """With all that a step may do: hooks, average of the weights, clipping; a batch with padding and an empty image."""
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    values = config_values(data, tmp_path / "run", f"waits_{tmp_path.name}")
    more = ["SOLVER.MAX_ITER", "2", "SOLVER.EMA.ENABLED", "True", "DATASETS.TEST", "()", "MODEL.DEVICE", device()]
    cfg = load_config(str(RECIPE), [*values, *more])
    register_datasets(cfg)
    trainer = DINOTrainer(cfg)
    batch = make_batch([3, 0, 5])
    batch[1]["image"] = batch[1]["image"][:, :40]  # padded
    trainer._trainer.data_loader = SameBatch(batch)
    return trainer


def device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def test_a_step_reads_from_its_device_twice(trainer: DINOTrainer) -> None:
    """The matcher's costs, and the losses at the end; all else that is read lies on the host wherever the model is."""
    counts = []
    step = trainer._trainer.run_step
    reads = Reads()

    def counted() -> None:
        reads.found.clear()
        step()

    trainer._trainer.run_step = counted
    trainer.after_step, after = (lambda: (after(), counts.append(reads.found.copy()))), trainer.after_step
    with reads:
        trainer.train()
    assert len(counts) == 2
    for found in counts:
        to_host = {(file, name): count for (file, name), count in found.items() if name in ("cpu", "tolist", "item")}
        assert to_host == {("matcher", "cpu"): 1, ("step", "tolist"): 1}
        others = {file for file, name in found if (file, name) not in to_host}
        assert others == {
            "dino",  # the classes of the images' objects, before they are sent to the device
            "ema",  # how many weights were averaged
            "matcher",  # NumPy's view of the costs that were read
        }
    assert {"total_loss", "grad_norm", "data_time", "loss_ce"} <= trainer.storage.histories().keys()


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_sees_two_transfers_to_the_host(trainer: DINOTrainer) -> None:
    with EventStorage():
        trainer._trainer.iter = 0
        trainer._trainer.run_step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            trainer._trainer.run_step()
    transfers = [event for event in profiled.events() if "Memcpy DtoH" in event.name]
    assert len(transfers) == 2
