"""Stop training when it no longer improves."""

from __future__ import annotations

import os

from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from dino_d2.pretrained import FINAL

from .checkpoints import BestWeights
from .ema import EMA
from .evaluations import after_last_step


class StopTraining(BaseException):
    """Leaves detectron2's training loop, which reports every `Exception` as a failure."""


class EarlyStopping(HookBase):
    """Stops training in all processes after a number of evaluations without improvement.

    A stopped run stops again at once when resumed, because `model_best.pth` records the best iteration, unless
    `evaluations` was increased.

    Args:
        evaluations: number without improvement, at least 1.
        period: iterations between evaluations.
        best: hook that tracks the best evaluation and runs before this one; None except in the main process.
        checkpointer: writes `model_final.pth` at the end.
        ema: writes `model_final_ema.pth` at the end; None without a moving average.
    """

    def __init__(
        self, evaluations: int, period: int, best: BestWeights | None, checkpointer: Checkpointer, ema: EMA | None
    ):
        self.evaluations, self.period, self.best = evaluations, period, best
        self.checkpointer, self.ema = checkpointer, ema

    def before_train(self) -> None:
        if not self._should_stop(self.trainer.start_iter):
            return
        if os.path.basename(self.checkpointer.get_checkpoint_file()) != FINAL:  # killed before it was saved
            with after_last_step(self.trainer):
                self._save()
        raise StopTraining

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period or done >= self.trainer.max_iter or not self._should_stop(done):
            return
        self._save()
        raise StopTraining

    def _save(self) -> None:
        if comm.is_main_process():
            if self.ema is not None:
                self.ema.save_final()
            # Last: it tells that all is saved.
            self.checkpointer.save(FINAL.removesuffix(".pth"), iteration=self.trainer.iter)

    def _should_stop(self, done: int) -> bool:
        """Whether to stop after `done` iterations, decided by the main process. Not before a value was measured."""
        best = self.best.best_iter if self.best is not None else None
        stop = best is not None and (done - best - 1) // self.period >= self.evaluations
        return any(comm.all_gather(stop))
