"""A training step: gradient accumulation, mixed precision, and handling of non-finite losses and gradients."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_d2.autocast import autocast, autocast_of_config
from dino_d2.modeling.criterion import boxes_per_process
from dino_d2.randomness import seed_from

from .non_finite import is_finite, write_report
from .optimizer import ClippedAdamW, resume_optimizer

STEPS = 1  # first key of the random numbers of training steps (DATA in dino_d2.data.loader for augmentation)
ON_NON_FINITE = ("stop", "skip")


@dataclass(frozen=True)
class StepSettings:
    """Settings of a training step.

    parts: number of forward and backward passes per batch (gradient accumulation).
    autocast: float16 or bfloat16; None without mixed precision.
    on_non_finite: "stop", or "skip" the step.
    output_dir: folder for reports on non-finite losses and gradients."""

    parts: int
    autocast: str | None
    on_non_finite: str
    output_dir: str

    @classmethod
    def of_config(cls, cfg: CfgNode) -> StepSettings:
        s = cfg.SOLVER
        return cls(s.ACCUMULATION_STEPS, autocast_of_config("SOLVER.AMP", s.AMP), s.ON_NON_FINITE, cfg.OUTPUT_DIR)

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"SOLVER.ACCUMULATION_STEPS is {self.parts}; it must be at least 1")
        if self.on_non_finite not in ON_NON_FINITE:
            raise ValueError(f"SOLVER.ON_NON_FINITE is {self.on_non_finite!r}; it must be stop or skip")


@dataclass(frozen=True)
class Metrics:
    """Metrics of one step over all processes. losses: means. grad_norm: None without clipping. data_time: maximum."""

    losses: dict[str, float]
    grad_norm: float | None
    data_time: float

    @property
    def total_loss(self) -> float:
        return sum(self.losses.values())

    def write(self, storage: EventStorage, iteration: int) -> None:
        """Store under detectron2's names. Infinite gradient norms, from float16 overflow, are skipped."""
        storage.put_scalars(cur_iter=iteration, data_time=self.data_time, total_loss=self.total_loss, **self.losses)
        if self.grad_norm is not None and math.isfinite(self.grad_norm):
            storage.put_scalar("grad_norm", self.grad_norm, cur_iter=iteration)


class StepTrainer(SimpleTrainer):
    """`SimpleTrainer` with gradient accumulation, autocast on any device, and reproducible steps.

    Every step seeds its random numbers from `seed`, the rank and the iteration. float16 losses are scaled to preserve
    small gradients; the scale is part of the state.

    A step synchronises with the device twice: for the matcher's costs and, before the optimizer step, for losses and
    gradient norm, for which processes exchange one small tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        settings: StepSettings,
        seed: int,
    ):
        super().__init__(model, data_loader, optimizer)
        self.settings, self.seed = settings, seed
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=settings.autocast == "float16")

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self._seed()
        self.optimizer.zero_grad()
        losses = self._accumulate(batch)
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        # Clip before checking losses and norm, to read both with one transfer; if they are not finite there is no step.
        norm = self.optimizer.clip() if isinstance(self.optimizer, ClippedAdamW) else None
        metrics = self._read(losses, norm, data_time)
        what = self._not_finite(metrics)
        if what is None:
            metrics.write(get_event_storage(), self.iter)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self._report(what, batch, losses, metrics.grad_norm)
            # Without a step the scaler would refuse the next gradients. The scale is kept: it was not at fault.
            self.grad_scaler.update(self.grad_scaler.get_scale())

    def _seed(self) -> None:
        seed_from(self.seed, STEPS, comm.get_rank(), self.iter)

    def _accumulate(self, batch: list[dict]) -> dict[str, Tensor]:
        """Accumulate the gradients of the batch part by part; return the losses of the whole batch, detached."""
        parts = split(batch, self.settings.parts)
        weights = loss_weights(parts, self.device) if len(parts) > 1 else [1.0]
        losses: dict[str, Tensor] = {}
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            delays_sync = isinstance(self.model, DistributedDataParallel) and number + 1 < len(parts)
            with self.model.no_sync() if delays_sync else nullcontext():  # all-reduce only with the last part
                with autocast(self.device.type, self.settings.autocast):
                    of_part = {name: loss * weight for name, loss in self.model(part).items()}
                self.grad_scaler.scale(sum(of_part.values())).backward()
            for name, loss in of_part.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        return losses

    def _read(self, losses: dict[str, Tensor], norm: Tensor | None, data_time: float) -> Metrics:
        """Average the losses over all processes, so that all agree on whether they are finite, with one transfer."""
        processes = comm.get_world_size()
        values = torch.stack(list(losses.values()))
        if processes > 1:
            times = values.new_zeros(processes)
            times[comm.get_rank()] = data_time
            values = torch.cat([values / processes, times])
            dist.all_reduce(values)
        read = torch.cat([values, values.new_zeros(0) if norm is None else norm[None].to(values)]).tolist()
        return Metrics(
            losses=dict(zip(losses, read, strict=False)),
            grad_norm=None if norm is None else read[-1],
            data_time=max(read[len(losses) : len(losses) + processes]) if processes > 1 else data_time,
        )

    def _not_finite(self, metrics: Metrics) -> str | None:
        """What prevents the step, the same in all processes."""
        if not math.isfinite(metrics.total_loss):
            return "loss"
        # float16 gradients overflow now and then: the scaler skips these steps itself and lowers the scale.
        if metrics.grad_norm is None or math.isfinite(metrics.grad_norm) or self.grad_scaler.is_enabled():
            return None
        return "gradient norm"

    def _report(self, what: str, batch: list[dict], losses: dict[str, Tensor], norm: float | None) -> None:
        """Report on this process only: processes must not wait for one that fails."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        self._seed()  # repeat the same random numbers
        with autocast(self.device.type, self.settings.autocast):
            path = write_report(self.settings.output_dir, self.iter, comm.get_rank(), model, batch, losses, norm)
        message = (
            f"the {what} of iteration {self.iter} is not finite; see {path} for images, losses and the first module"
        )
        advice = (
            "Lower SOLVER.BASE_LR, check SOLVER.CLIP_GRADIENTS, or resume from an earlier checkpoint (--resume-from)"
        )
        if self.settings.on_non_finite == "stop":
            raise FloatingPointError(f"{message}. {advice}")
        if not is_finite(list(model.parameters())):
            raise FloatingPointError(f"{message}. Skipping does not help: the weights are not finite either. {advice}")
        logging.getLogger(__name__).warning("%s; skipping the step", message)

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        # As in detectron2, but the optimizer keeps the settings of the config.
        TrainerBase.load_state_dict(self, state_dict)
        resume_optimizer(self.optimizer, state_dict["optimizer"])
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def split(batch: list[dict], parts: int) -> list[list[dict]]:
    """Split a batch into `parts` of equal size. Inputs also get the largest number of objects in the whole batch, which
    determines the groups of denoising queries.

    Raises:
        ValueError: the batch size is not divisible by `parts`.
    """
    if len(batch) % parts:
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS is {parts}; it must divide the {len(batch)} images of each process"
        )
    if parts == 1:
        return [batch]
    most = max(len(x["instances"]) for x in batch)
    batch = [x | {"most_objects": most} for x in batch]
    size = len(batch) // parts
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def loss_weights(parts: list[list[dict]], device: torch.device) -> list[Tensor]:
    """Weight of each part's losses, which are divided by the part's number of boxes instead of the batch's."""
    counts = [sum(len(x["instances"]) for x in part) for part in parts]
    total = boxes_per_process(sum(counts), torch.zeros((), dtype=torch.float64, device=device))
    return [boxes_per_process(count, total) / total for count in counts]
