"""detectron2's DefaultTrainer with DINO's optimizer, data, steps and averages."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.data import (
    ImageMapper,
    TrainingLoader,
    build_test_augmentation,
    build_test_loader,
    build_train_augmentation,
    build_train_loader,
)
from dino_d2.evaluation import QueryEvaluator

from .ema import EMA
from .optimizer import build_optimizer
from .step import StepSettings, StepTrainer
from .writers import ProgressPrinter, WandbWriter


def distributed(model: nn.Module) -> nn.Module:
    """`model`, wrapped if there are several processes."""
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(model, [comm.get_local_rank()] if on_gpu else None, broadcast_buffers=False)


class DINOTrainer(DefaultTrainer):
    """Everything that is not named here is detectron2's.

    A resumed run goes on exactly: the iteration decides which images come next and which random numbers are drawn.
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer's, which knows neither processes without GPUs nor this step; the order is its own.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = StepTrainer(
            distributed(model), self.build_train_loader(cfg), optimizer, StepSettings.of_config(cfg)
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DINOCheckpointer(
            self.model, cfg.OUTPUT_DIR, trust_files=cfg.MODEL.TRUST_WEIGHTS, trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.ema = EMA(model, cfg.SOLVER.EMA.DECAY, cfg.OUTPUT_DIR) if cfg.SOLVER.EMA.ENABLED else None
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        evaluation = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self.evaluate)
        built = [evaluation if isinstance(hook, hooks.EvalHook) else hook for hook in super().build_hooks()]
        return [self.ema, *built]  # the average first: the checkpointer saves it

    def evaluate(self) -> dict[str, Any]:
        """Results of the weights, and of their average under "ema"."""
        results = dict(self.test(self.cfg, self.model))
        if self.ema is not None:
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "ema"))
            averaged = self.test(cfg, self.ema.model)
            if averaged:
                results["ema"] = averaged
        self._last_eval_results = results
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self.data_loader.first_batch = self.start_iter

    def resume_from(self, checkpoint: str) -> None:
        """Go on from that file instead of the last one."""
        self.checkpointer.load(checkpoint)
        self.start_iter = self.data_loader.first_batch = self.iter + 1

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seed": self.data_loader.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.data_loader.seed = state_dict["seed"]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainingLoader:
        mapper = ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])
        return build_train_loader(cfg, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        mapper = ImageMapper(cfg, is_train=False, augmentations=[build_test_augmentation(cfg)])
        return build_test_loader(cfg, dataset_name, mapper)

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
