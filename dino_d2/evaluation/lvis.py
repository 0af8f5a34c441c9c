"""LVIS AP without the package `lvis`."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from detectron2 import evaluation

from dino_d2.lvis import in_place_of_lvis

from .settings import APSettings, require_hotcoco

logger = logging.getLogger(__name__)

MAX_DETS = 300  # per image, over all classes; LVIS's limit


class LVISEvaluator(evaluation.LVISEvaluator):
    """detectron2's evaluator with hotcoco; `APSettings.backend` is ignored.

    Args:
        dataset_name: registered with detectron2, with the metadata "json_file".
        settings: `max_dets` is used if it is larger than LVIS's 300 detections per image.
        tasks, distributed, output_dir: see :class:`detectron2.evaluation.LVISEvaluator`.

    Raises:
        ImportError: hotcoco is not installed.
    """

    def __init__(
        self,
        dataset_name: str,
        settings: APSettings | None = None,
        *,
        tasks: tuple[str, ...] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ):
        require_hotcoco(f"LVIS AP of {dataset_name!r}")
        max_dets = max(MAX_DETS, (settings or APSettings()).max_dets)
        with in_place_of_lvis():
            super().__init__(dataset_name, tasks, distributed, output_dir, max_dets_per_image=max_dets)

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        version = importlib.metadata.version("hotcoco")
        logger.info("Computing LVIS AP of %s with hotcoco %s", self._metadata.name, version)
        with in_place_of_lvis():
            super()._eval_predictions(predictions)
