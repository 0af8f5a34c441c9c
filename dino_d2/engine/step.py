"""One training step: parts of a batch, mixed precision, and what happens when a loss is not finite."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_d2.autocast import autocast, autocast_of_config
from dino_d2.modeling.criterion import boxes_per_process
from dino_d2.randomness import seed_from

from .non_finite import is_finite, write_report

STEPS = 1  # first number of the keys of the random numbers that a step draws (dino_d2.data.loader has DATA)
ON_NON_FINITE = ("stop", "skip")


@dataclass(frozen=True)
class StepSettings:
    """parts: how many forward and backward passes a batch is worked on in. autocast: float16, bfloat16 or, without
    mixed precision, None. on_non_finite: "stop", or "skip" the step. output_dir: where a report of such a step goes."""

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


class StepTrainer(SimpleTrainer):
    """`SimpleTrainer` with parts, autocast on any device, and steps that can be repeated exactly.

    Every step seeds its random numbers from the loader's seed, the process and the iteration. float16 losses are
    scaled, so that small gradients survive; the scale is part of the state.
    """

    def __init__(
        self, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer, settings: StepSettings
    ):
        """`data_loader` has a `seed`."""
        super().__init__(model, data_loader, optimizer)
        self.settings = settings
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
        losses, all_finite = self._read(losses)
        if not all_finite:
            self._report(batch, losses)
            return
        self._write_metrics(losses, data_time)
        self.grad_scaler.unscale_(self.optimizer)  # before the step, which may clip what it finds
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _seed(self) -> None:
        seed_from(self.data_loader.seed, STEPS, comm.get_rank(), self.iter)

    def _accumulate(self, batch: list[dict]) -> dict[str, Tensor]:
        """Gradients of the whole batch, part by part; the losses of the whole batch, detached."""
        parts = split(batch, self.settings.parts)
        shares = shares_of_boxes(parts, self.device) if len(parts) > 1 else [1.0]
        losses: dict[str, Tensor] = {}
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            waits = isinstance(self.model, DistributedDataParallel) and number + 1 < len(parts)
            with self.model.no_sync() if waits else nullcontext():  # gradients meet once, with the last part
                with autocast(self.device.type, self.settings.autocast):
                    of_part = {name: loss * share for name, loss in self.model(part).items()}
                self.grad_scaler.scale(sum(of_part.values())).backward()
            for name, loss in of_part.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        return losses

    def _read(self, losses: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The losses on the host, and whether those of all processes are finite: they must agree on what to do.

        All in one transfer: after the matcher's, the only time that a step waits for its device.
        """
        values = torch.stack(list(losses.values()))
        bad = values.sum().isfinite().logical_not().to(values)
        if comm.get_world_size() > 1:
            dist.all_reduce(bad)
        *on_host, bad = torch.cat([values, bad[None]]).cpu().unbind()
        return dict(zip(losses, on_host, strict=True)), not bad

    def _report(self, batch: list[dict], losses: dict[str, Tensor]) -> None:
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        self._seed()  # so that the same numbers are drawn again
        with autocast(self.device.type, self.settings.autocast):
            path = write_report(self.settings.output_dir, self.iter, comm.get_rank(), model, batch, losses)
        message = f"the loss of iteration {self.iter} is not finite; images, losses and the first module: {path}"
        advice = (
            "Lower SOLVER.BASE_LR, check SOLVER.CLIP_GRADIENTS, or go on from an earlier checkpoint (--resume-from)"
        )
        if self.settings.on_non_finite == "stop":
            raise FloatingPointError(f"{message}. {advice}")
        if not is_finite(list(model.parameters())):
            raise FloatingPointError(f"{message}. The weights are not finite, skipping cannot help. {advice}")
        logging.getLogger(__name__).warning("%s; the step is skipped", message)

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def split(batch: list[dict], parts: int) -> list[list[dict]]:
    """`parts` parts of the same size.

    Raises:
        ValueError: the batch has no such parts.
    """
    if len(batch) % parts:
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS is {parts}, but the {len(batch)} images of a process cannot be parted evenly"
        )
    size = len(batch) // parts
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def shares_of_boxes(parts: list[list[dict]], device: torch.device) -> list[Tensor]:
    """What the losses of each part count in the batch: a part divides by its own number of boxes, not the batch's."""
    counts = [sum(len(x["instances"]) for x in part) for part in parts]
    whole = boxes_per_process(sum(counts), torch.zeros((), dtype=torch.float64, device=device))
    return [boxes_per_process(count, whole) / whole for count in counts]
