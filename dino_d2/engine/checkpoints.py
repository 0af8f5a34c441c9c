"""Which checkpoints to keep: detectron2's hooks, made resumable."""

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
        model: the model that the metric is measured with.
        output_dir: folder of the file.
        metric: its name in metrics.json, such as bbox/AP or ema/bbox/AP; higher is better.
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
    """The part of a checkpointer that detectron2's hook uses."""

    model: nn.Module
    output_dir: str
    metric: str

    def save(self, name: str, iteration: int) -> None:
        value, _ = get_event_storage().latest()[self.metric]
        content = {"model": self.model.state_dict(), "iteration": iteration, self.metric: value}
        write_checkpoint(content, self.output_dir, f"{name}.pth")
