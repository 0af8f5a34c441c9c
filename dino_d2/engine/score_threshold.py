"""Store the score threshold of an evaluation with the evaluated weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from dino_d2.checkpoint.assumptions import EXTRA_STATE, Assumptions
from dino_d2.checkpoint.files import write_checkpoint
from dino_d2.pretrained import FINAL

from . import ema


class EvaluationOfThreshold(hooks.EvalHook):
    """detectron2's hook; it also sets the score threshold of the evaluated models.

    Checkpoints saved after the evaluation, such as `model_best.pth`, have the threshold. The next step clears it,
    because it changes the weights. The last evaluation runs after the final checkpoints are saved, so they are updated.

    Args:
        period: of the evaluations, in iterations.
        evaluate: returns the results of the weights, and those of their moving average under "ema".
        datasets: names of the evaluated datasets; the first with a threshold decides.
        weights: the trained model, unwrapped.
        average: the model with the moving average, if there is one.
        output_dir: folder of the checkpoints.

    Attributes:
        results: of the last evaluation; empty before the first, and in all processes but the main one.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], Mapping[str, Any]],
        datasets: Sequence[str],
        weights: nn.Module,
        average: nn.Module | None,
        output_dir: str,
    ):
        super().__init__(period, self._evaluate)
        self.evaluate, self.datasets = evaluate, datasets
        self.weights, self.average, self.output_dir = weights, average, output_dir
        self.results: Mapping[str, Any] = {}

    def before_step(self) -> None:
        self._keep({})

    def after_train(self) -> None:
        super().after_train()
        if self.trainer.iter + 1 < self.trainer.max_iter or not comm.is_main_process():
            return
        for name in (FINAL, ema.FINAL):
            path = os.path.join(self.output_dir, name)
            if PathManager.isfile(path):
                self._write_into(path)

    def _evaluate(self) -> Mapping[str, Any]:
        self.results = self.evaluate()
        self._keep(self.results)
        return self.results

    def _keep(self, results: Mapping[str, Any]) -> None:
        for model, own in ((self.weights, results), (self.average, results.get("ema", {}))):
            if hasattr(model, "assumptions"):  # a DINO
                threshold = found_threshold(own, self.datasets)
                model.assumptions = replace(model.assumptions, score_threshold=threshold)

    def _write_into(self, path: str) -> None:
        """Update the assumptions in a final checkpoint."""
        content = torch.load(PathManager.get_local_path(path), map_location="cpu", weights_only=True, mmap=True)
        of_average = path.endswith(ema.FINAL)
        changed = _change(content["model"], EXTRA_STATE, self.average if of_average else self.weights)
        if not of_average and self.average is not None:
            changed |= _change(content["trainer"]["hooks"]["EMA"], f"module.{EXTRA_STATE}", self.average)
        if changed:
            write_checkpoint(content, self.output_dir, os.path.basename(path))


def found_threshold(results: Mapping[str, Any], datasets: Sequence[str]) -> float | None:
    """The score threshold in evaluation results, or None.

    Args:
        results: of one dataset, or by dataset name.
        datasets: their names; the first with a threshold decides.
    """
    for one in (results, *(results.get(name, {}) for name in datasets)):
        threshold = one.get("bbox", {}).get("score_threshold", math.nan)
        if not math.isnan(threshold):
            return threshold
    return None


def _change(state: dict[str, Tensor], name: str, model: nn.Module) -> bool:
    """Set the threshold in `state` to the model's; returns whether it changed."""
    if name not in state:
        return False
    stored = Assumptions.from_tensor(state[name])
    threshold = model.assumptions.score_threshold
    if stored.score_threshold == threshold:
        return False
    state[name] = replace(stored, score_threshold=threshold).to_tensor()
    return True
