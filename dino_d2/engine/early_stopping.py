"""The end of a run that does not become better."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from .checkpoints import BestWeights


class TrainingIsOver(BaseException):
    """Leaves detectron2's loop, which reports every `Exception` as a failure."""


class EarlyStopping(HookBase):
    """Ends training when that many evaluations in a row were not better than the best, in all processes at once.

    A run that was ended so is over when it is resumed: `model_best.pth` says when it was best. It goes on if more
    evaluations are allowed than before.

    Args:
        evaluations: without a better one, at least 1.
        period: of the evaluations, in iterations.
        best: what knows of the best evaluation, and is told of one before this hook; None in other processes than the
            main one.
        checkpointer: which writes `model_final.pth` when the run ends.
    """

    def __init__(self, evaluations: int, period: int, best: BestWeights | None, checkpointer: Checkpointer):
        self.evaluations, self.period, self.best, self.checkpointer = evaluations, period, best, checkpointer

    def before_train(self) -> None:
        if self._is_over(self.trainer.start_iter):
            raise TrainingIsOver

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period or done >= self.trainer.max_iter or not self._is_over(done):
            return
        if comm.is_main_process():
            self.checkpointer.save("model_final", iteration=self.trainer.iter)
        raise TrainingIsOver

    def _is_over(self, done: int) -> bool:
        """After `done` iterations, as the main process says."""
        over = False
        if self.best is not None:
            best = 0 if self.best.best_iter is None else self.best.best_iter + 1
            over = (done - best) // self.period >= self.evaluations
        return any(comm.all_gather(over))
