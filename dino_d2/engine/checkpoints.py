"""Which checkpoints to keep: detectron2's hooks, made resumable."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from torch import nn

from dino_d2.checkpoint.files import write_checkpoint

from .score_threshold import EvaluationOfThreshold

BEST = "model_best"
NUMBERED = re.compile(r"model_(\d{7})\.pth")


class RecentCheckpoints(hooks.PeriodicCheckpointer):
    """detectron2's `PeriodicCheckpointer`; `max_to_keep` also counts checkpoints from before a resume."""

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is None:
            return
        files = sorted(self.checkpointer.get_all_checkpoint_files())
        found = [(file, NUMBERED.fullmatch(Path(file).name)) for file in files]
        earlier = [file for file, match in found if match and int(match[1]) < self.trainer.start_iter]
        self.recent_checkpoints = earlier


class BestWeights(hooks.BestCheckpointer):
    """Saves the weights with the best `metric` as `model_best.pth`: {"model", "iteration", metric: value}.

    Does not change `last_checkpoint` or the training state. A resumed run continues with the best value so far.

    Args:
        eval_period: iterations between evaluations.
        evaluation: the hook that evaluates; it runs before this one.
        model: the model that the metric is measured with.
        output_dir: folder of the file.
        metric: a result of the evaluation where higher is better, such as bbox/AP or ema/bbox/AP.
    """

    def __init__(
        self, eval_period: int, evaluation: EvaluationOfThreshold, model: nn.Module, output_dir: str, metric: str
    ):
        super().__init__(eval_period, _WeightsFile(model, output_dir, metric), metric, file_prefix=BEST)
        self._evaluation = evaluation
        self._path = os.path.join(output_dir, f"{BEST}.pth")

    def before_train(self) -> None:
        if self.trainer.start_iter == 0 or not PathManager.isfile(self._path):
            return
        best = torch.load(PathManager.get_local_path(self._path), map_location="cpu", weights_only=True, mmap=True)
        if self._val_metric in best and best["iteration"] <= self.trainer.start_iter:
            self._update_best(best[self._val_metric], best["iteration"])

    def _best_checking(self) -> None:
        """As in detectron2, but a metric that is not among the results is an error; no results at all are none.

        Raises:
            ValueError: it is not; the training so far was saved.
        """
        measured = flatten_results_dict(self._evaluation.results)
        if self._val_metric in measured:
            super()._best_checking()
        elif measured:
            done = self.trainer.iter
            if done < self.trainer.max_iter:  # else model_final.pth was saved
                self.trainer.checkpointer.save(f"model_{done:07d}", iteration=done)
            raise ValueError(
                f"SOLVER.BEST_METRIC is {self._val_metric}, which is not among the results of the evaluation: "
                f"{', '.join(measured)}. Set it to one of these and continue with --resume; nothing is lost"
            )


@dataclass(frozen=True)
class _WeightsFile:
    """The part of a checkpointer that detectron2's hook uses."""

    model: nn.Module
    output_dir: str
    metric: str

    def save(self, name: str, iteration: int) -> None:
        value, _ = get_event_storage().latest()[self.metric]
        content = {"model": self.model.state_dict(), "iteration": iteration, self.metric: value}
        write_checkpoint(content, self.output_dir, f"{name}.pth")
