"""Which checkpoints of a run are kept: detectron2's hooks, with what a resumed run must know."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.engine import hooks
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from torch import nn

from dino_d2.checkpoint.files import write_checkpoint

BEST = "model_best"
NUMBERED = re.compile(r"model_(\d{7})\.pth")


class RecentCheckpoints(hooks.PeriodicCheckpointer):
    """detectron2's; with `max_to_keep` it also removes those that a resumed run has made before."""

    def before_train(self) -> None:
        super().before_train()
        if self.max_to_keep is None:
            return
        files = sorted(self.checkpointer.get_all_checkpoint_files())
        found = [(file, NUMBERED.fullmatch(Path(file).name)) for file in files]
        earlier = [file for file, match in found if match and int(match[1]) < self.trainer.start_iter]
        self.recent_checkpoints = earlier


class BestWeights(hooks.BestCheckpointer):
    """Keeps the weights that were best in `metric` so far as `model_best.pth`: {"model", "iteration", metric: value}.

    Neither `last_checkpoint` nor the state of the run changes. A resumed run takes up the best value so far.

    Args:
        eval_period: of the evaluations, in iterations.
        model: whose weights are evaluated under that metric.
        output_dir: where the file lies.
        metric: its name in metrics.json, such as bbox/AP or ema/bbox/AP; more is better.
    """

    def __init__(self, eval_period: int, model: nn.Module, output_dir: str, metric: str):
        super().__init__(eval_period, _WeightsFile(model, output_dir, metric), metric, file_prefix=BEST)
        self._path = os.path.join(output_dir, f"{BEST}.pth")

    def before_train(self) -> None:
        if self.trainer.start_iter == 0 or not PathManager.isfile(self._path):
            return
        best = torch.load(PathManager.get_local_path(self._path), map_location="cpu", weights_only=True, mmap=True)
        if self._val_metric in best and best["iteration"] <= self.trainer.start_iter:
            self._update_best(best[self._val_metric], best["iteration"])


@dataclass(frozen=True)
class _WeightsFile:
    """As much of a checkpointer as detectron2's hook asks for."""

    model: nn.Module
    output_dir: str
    metric: str

    def save(self, name: str, iteration: int) -> None:
        value, _ = get_event_storage().latest()[self.metric]
        content = {"model": self.model.state_dict(), "iteration": iteration, self.metric: value}
        write_checkpoint(content, self.output_dir, f"{name}.pth")
