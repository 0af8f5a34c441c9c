"""How often a training step waits for its device: each time, the device runs dry."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import dino_d2
from dino_d2.engine import build_optimizer
from dino_d2.engine.step import StepSettings, StepTrainer
from tests.synthetic import SameBatch, make_batch

PACKAGE = Path(dino_d2.__file__).parent

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


def make_trainer(cfg: CfgNode) -> StepTrainer:
    batch = make_batch([3, 0, 5])
    batch[1]["image"] = batch[1]["image"][:, :40]  # padded
    model = build_model(cfg)
    return StepTrainer(model, SameBatch(batch), build_optimizer(cfg, model), StepSettings.of_config(cfg))


def test_a_step_reads_from_its_device_twice(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matcher's costs, and the losses at the end; all else that is read lies on the host wherever the model is."""
    trainer = make_trainer(tiny_cfg)
    metrics = {}
    monkeypatch.setattr(trainer, "_write_metrics", lambda losses, seconds: metrics.update(losses))
    with Reads() as reads:
        trainer.run_step()
    to_host = {file: count for (file, name), count in reads.found.items() if name == "cpu"}
    assert to_host == {"matcher": 1, "step": 1}
    on_host = {
        "dino",  # the classes of the images' objects, before they are sent to the device
        "matcher",  # NumPy's view of the costs that were read
        "step",  # the losses that were read
    }
    assert {file for file, name in reads.found if name != "cpu"} == on_host
    assert all(loss.device.type == "cpu" for loss in metrics.values())


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_an_accelerator_sees_two_transfers_to_the_host(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.DEVICE = torch.accelerator.current_accelerator().type
    trainer = make_trainer(tiny_cfg)
    with EventStorage():
        trainer.run_step()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            trainer.run_step()
    transfers = [event for event in profiled.events() if "Memcpy DtoH" in event.name]
    assert len(transfers) == 2
