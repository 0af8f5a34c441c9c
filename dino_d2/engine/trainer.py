"""detectron2's DefaultTrainer with DINO's optimizer, augmentation and precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils.events import EventWriter
from torch import nn

from dino_d2.data import ImageMapper, build_test_augmentation, build_train_augmentation
from dino_d2.evaluation import QueryEvaluator

from .mixed_precision import MixedPrecisionTrainer
from .optimizer import build_optimizer
from .writers import ProgressPrinter, WandbWriter


class DINOTrainer(DefaultTrainer):
    """Everything that is not named here is detectron2's."""

    def __init__(self, cfg: CfgNode):
        precision = cfg.SOLVER.AMP.clone()
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.AMP.ENABLED = False  # detectron2's own trainer for it refuses to work without CUDA
        super().__init__(cfg)
        if precision.ENABLED:
            parts = (self._trainer.model, self._trainer.data_loader, self._trainer.optimizer)
            self._trainer = MixedPrecisionTrainer(*parts, dtype=precision.DTYPE)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        mapper = ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        mapper = ImageMapper(cfg, is_train=False, augmentations=[build_test_augmentation(cfg)])
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    def build_writers(self) -> list[EventWriter]:
        """A line for people first: it records what the others write."""
        _, *others = super().build_writers()
        line = ProgressPrinter(self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH, self.model, self.optimizer)
        return [line, *others, *([WandbWriter(self.cfg)] if self.cfg.WANDB_PROJECT else [])]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference", dataset_name)))

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """detectron2's; with `TEST.QUERY_METRICS` the default evaluators measure the queries too."""
        if cfg.TEST.QUERY_METRICS and evaluators is None:
            evaluators = [
                DatasetEvaluators([cls.build_evaluator(cfg, name), QueryEvaluator(name, model)])
                for name in cfg.DATASETS.TEST
            ]
        return super().test(cfg, model, evaluators)
