"""Which evaluation was finished, so that a resumed run repeats one in which it was killed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dino_d2.checkpoint.files import write_atomically

RECORD = "last_evaluation"  # beside last_checkpoint: the number of iterations up to which evaluations are finished


@contextmanager
def after_last_step(trainer: TrainerBase) -> Iterator[None]:
    """For `before_train` of a resumed run: iterations are counted as after the last step of the run before."""
    trainer.iter = trainer.storage.iter = trainer.start_iter - 1
    yield
    trainer.iter = trainer.storage.iter = trainer.start_iter


class FinishedEvaluations(HookBase):
    """Records which evaluation was finished. Before training it repeats the one that is due but was not.

    Checkpoints are saved before the evaluation of the same iteration, so that a run that is killed in it resumes
    behind it.

    Args:
        period: iterations between evaluations.
        parts: the hooks that evaluate and use the results; they run before this one. The main process has all of them.
        output_dir: folder of the record, which the main process writes and reads.
    """

    def __init__(self, period: int, parts: Sequence[HookBase], output_dir: str):
        self.period, self.parts, self.output_dir = period, parts, output_dir

    def before_train(self) -> None:
        done = self.trainer.start_iter
        finished = comm.all_gather(self._last() == done)[0]  # as the main process says
        if self._is_due(done) and not finished:
            logging.getLogger(__name__).info("The evaluation after %d iterations was not finished: repeating it", done)
            with after_last_step(self.trainer):
                for part in self.parts:
                    part.after_step()
        self._record(done)  # also if none is due: that of another run, or of later iterations, does not count

    def after_step(self) -> None:
        if self._is_due(self.trainer.iter + 1):
            self._record(self.trainer.iter + 1)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not after an error
            self._record(self.trainer.max_iter)

    def _is_due(self, done: int) -> bool:
        """Whether the parts evaluate after so many iterations; after the last they do it when training has ended."""
        return self.period > 0 and 0 < done < self.trainer.max_iter and done % self.period == 0

    def _record(self, done: int) -> None:
        if comm.is_main_process():
            write_atomically(self.output_dir, RECORD, lambda file: file.write(str(done).encode()))

    def _last(self) -> int:
        """The number of iterations in the record; 0 without one."""
        path = os.path.join(self.output_dir, RECORD)
        if not PathManager.isfile(path):
            return 0
        with PathManager.open(path) as file:
            return int(file.read())
