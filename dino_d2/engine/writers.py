"""Training output: a readable console line, and Weights & Biases."""

from __future__ import annotations

import importlib
import resource
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter, get_event_storage
from torch import nn

LOSS_KINDS = {"loss_ce": "class", "loss_bbox": "box", "loss_giou": "giou"}


def loss_group(name: str) -> str | None:
    """The group of a loss, by its name in the criterion; None if `name` is not a loss.

    Matched queries of all decoder layers form "class", "box" (L1) and "giou"; denoising queries form "denoising",
    proposals "encoder". Any other loss is its own group. The groups add up to the total loss.
    """
    if not name.startswith("loss"):
        return None
    if "_dn" in name:
        return "denoising"
    if name.endswith("_interm"):
        return "encoder"
    kind = name.rstrip("0123456789").rstrip("_")
    return LOSS_KINDS.get(kind, kind.removeprefix("loss_"))


def grouped_losses(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sum the losses among (name, value) scalars by group."""
    groups: dict[str, float] = defaultdict(float)
    for name, value in values:
        group = loss_group(name)
        if group is not None:
            groups[group] += value
    return dict(groups)


def learning_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Highest learning rates of the trained parameters: `lr_backbone`, and `lr_rest` for all others."""
    backbone = {id(p) for name, p in model.named_parameters() if "backbone." in name}
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for part in {"lr_backbone" if id(p) in backbone else "lr_rest" for p in group["params"]}:
            rates[part] = max(group["lr"], rates.get(part, 0.0))
    return dict(sorted(rates.items()))


class ProgressPrinter(CommonMetricPrinter):
    """Prints one line with grouped losses, where detectron2 prints every loss of every layer.

    Values other than learning rates are means over the last `window_size` iterations. Also records `lr_backbone`,
    `lr_rest` and `images_per_second`, so it must come before the writers that write them. metrics.json and TensorBoard
    have every loss.

    Args:
        max_iter: of the run, to estimate the remaining time.
        images_per_step: over all processes.
        model, optimizer: to get the learning rates.
        window_size: in iterations.
    """

    def __init__(
        self,
        max_iter: int,
        images_per_step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        window_size: int = 20,
    ):
        super().__init__(max_iter, window_size)
        self._images_per_step = images_per_step
        self._model, self._optimizer = model, optimizer

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return  # called once more after training

        mean = {
            name: history.avg(storage.count_samples(name, self._window_size))
            for name, history in storage.histories().items()
            if loss_group(name) or name in ("total_loss", "grad_norm", "time", "data_time")
        }
        rates = learning_rates(self._model, self._optimizer)
        storage.put_scalars(**rates, smoothing_hint=False)
        groups = " + ".join(f"{name} {value:.3g}" for name, value in grouped_losses(mean.items()).items())
        parts = [f"iter {storage.iter + 1}/{self._max_iter}"]
        if "total_loss" in mean:
            parts.append(f"loss {mean['total_loss']:.4g} = {groups}" if groups else f"loss {mean['total_loss']:.4g}")
        if "grad_norm" in mean:
            parts.append(f"grad norm {mean['grad_norm']:.3g}")
        parts.append("lr " + ", ".join(f"{rate:.3g} ({part.removeprefix('lr_')})" for part, rate in rates.items()))
        if "time" in mean:  # detectron2 skips the first iterations
            speed = self._images_per_step / mean["time"]
            storage.put_scalar("images_per_second", speed, smoothing_hint=False)
            parts.append(f"{mean['time']:.3g} s/iter ({mean.get('data_time', 0):.2g} for data), {speed:.3g} images/s")
        parts.append(f"{_peak_memory() / 2**30:.1f} GiB")
        eta = self._get_eta(storage)
        if eta:
            parts.append(f"{eta} left")
        self.logger.info(" | ".join(parts))


def _peak_memory() -> float:
    """Peak memory in bytes, of the GPU or else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class WandbWriter(EventWriter):
    """Logs all scalars, smoothed as in metrics.json, to Weights & Biases.

    Args:
        cfg: gives the project (`WANDB_PROJECT`) and the run's name (last part of `OUTPUT_DIR`); stored with the run.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, cfg: CfgNode):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                f"WANDB_PROJECT is {cfg.WANDB_PROJECT!r}, but wandb is not installed: pip install wandb, or set "
                "the key to ''"
            ) from error
        name = Path(cfg.OUTPUT_DIR).resolve().name
        self._run = wandb.init(project=cfg.WANDB_PROJECT, name=name, dir=cfg.OUTPUT_DIR, config={"config": cfg.dump()})
        self._last_write = -1

    def write(self) -> None:
        storage: EventStorage = get_event_storage()
        by_iteration: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint().items():
            if iteration > self._last_write:
                by_iteration[iteration][name] = value
        for iteration, scalars in sorted(by_iteration.items()):
            self._run.log(scalars, step=iteration)
            self._last_write = iteration

    def close(self) -> None:
        self._run.finish()
