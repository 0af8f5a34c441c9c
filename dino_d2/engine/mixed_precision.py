"""Mixed precision on any device; detectron2's trainer has it for CUDA alone."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from detectron2.engine import SimpleTrainer
from torch import nn

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class MixedPrecisionTrainer(SimpleTrainer):
    """`SimpleTrainer` whose forward pass runs under autocast.

    float16 losses are scaled, so that small gradients survive; the scale is part of the state. bfloat16 has
    the range of float32 and needs none.
    """

    def __init__(self, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer, dtype: str):
        super().__init__(model, data_loader, optimizer)
        if dtype not in DTYPES:
            raise ValueError(f"SOLVER.AMP.DTYPE is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        self.device_type = next(model.parameters()).device.type
        self.dtype = DTYPES[dtype]
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=self.dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast(self.device_type, self.dtype):
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.unscale_(self.optimizer)  # before the step, which may clip what it finds
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
