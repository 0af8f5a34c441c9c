"""Exponential moving average of the weights, evaluated and saved alongside them."""

from __future__ import annotations

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dino_d2.checkpoint.files import write_checkpoint

FINAL = "model_final_ema.pth"


class EMA(HookBase):
    """Updates the average after each step: average = decay * average + (1 - decay) * weights. Buffers are copied.

    The average is part of the trainer's state; at the end of training, also of one that
    `EarlyStopping` ends, it is saved as `model_final_ema.pth`.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str):
        """`model`: the trained model, not wrapped for data parallelism."""
        self.source = model
        self.average = AveragedModel(model).eval()
        self.move = get_ema_multi_avg_fn(decay)
        self.output_dir = output_dir

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights, for evaluation."""
        return self.average.module

    @torch.no_grad()
    def after_step(self) -> None:
        # Like AveragedModel.update_parameters, which synchronises with the device at every step.
        averages, weights = list(self.model.parameters()), list(self.source.parameters())
        if self.average.n_averaged == 0:  # on the host
            torch._foreach_copy_(averages, weights)
        else:
            self.move(averages, weights, None)
        for ours, theirs in zip(self.model.buffers(), self.source.buffers(), strict=True):
            ours.copy_(theirs)
        self.average.n_averaged += 1

    def after_train(self) -> None:
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            self.save_final()

    def save_final(self) -> None:
        """Write `model_final_ema.pth`."""
        write_checkpoint({"model": self.model.state_dict()}, self.output_dir, FINAL)

    def state_dict(self) -> dict:
        return self.average.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.average.load_state_dict(state)
