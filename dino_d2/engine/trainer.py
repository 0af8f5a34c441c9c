"""detectron2's `DefaultTrainer` with DINO's optimizer, data, training step and EMA."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn, optim

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.data import (
    ImageMapper,
    TrainingLoader,
    build_test_augmentation,
    build_test_loader,
    build_train_augmentation,
    build_train_loader,
    check_classes,
)
from dino_d2.evaluation import APSettings, QueryEvaluator, build_evaluator

from .checkpoints import BestWeights, RecentCheckpoints
from .early_stopping import EarlyStopping, StopTraining
from .ema import EMA
from .evaluations import FinishedEvaluations
from .optimizer import build_optimizer
from .processes import check_same_start
from .run_folder import EVALUATION, settings_of_training
from .score_threshold import EvaluationOfThreshold
from .step import StepSettings, StepTrainer
from .writers import ProgressPrinter, WandbWriter

LEAST = {"MAX_ITER": 1, "CHECKPOINT_PERIOD": 1, "CHECKPOINT_KEEP": 0, "EARLY_STOPPING": 0}  # values of SOLVER


class DINOTrainer(DefaultTrainer):
    """`DefaultTrainer` for DINO.

    Resuming is exact: images and random numbers depend only on the seed and the iteration.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer.__init__ supports neither distributed CPU training nor StepTrainer; same order as there.
        TrainerBase.__init__(self)
        for name in ("detectron2", "dino_d2"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):  # not set up yet
                setup_logger(distributed_rank=comm.get_rank(), name=name)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        for key, least in LEAST.items():
            if cfg.SOLVER[key] < least:
                raise ValueError(f"SOLVER.{key} is {cfg.SOLVER[key]}; it must be at least {least}")
        APSettings.of_config(cfg)  # else its errors come at the first evaluation
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_classes(cfg, cfg.DATASETS.TRAIN)  # again, for custom loaders; class names are known now
        device_ids = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
        self._trainer = StepTrainer(
            create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids),
            data_loader,
            optimizer,
            StepSettings.of_config(cfg),
            cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DINOCheckpointer(
            self.model, cfg.OUTPUT_DIR, trust_files=cfg.MODEL.TRUST_WEIGHTS, trainer=weakref.proxy(self)
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.ema = EMA(model, cfg.SOLVER.EMA.DECAY, cfg.OUTPUT_DIR) if cfg.SOLVER.EMA.ENABLED else None
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks, with EMA, checkpoint retention and early stopping."""
        solver, period = self.cfg.SOLVER, self.cfg.TEST.EVAL_PERIOD
        built: list[HookBase | None] = [self.ema]  # first: the checkpointer saves it
        for hook in super().build_hooks():
            if isinstance(hook, hooks.PeriodicCheckpointer):
                keep = solver.CHECKPOINT_KEEP or None
                built.append(RecentCheckpoints(self.checkpointer, solver.CHECKPOINT_PERIOD, max_to_keep=keep))
            elif isinstance(hook, hooks.EvalHook):
                models = self.checkpointer.model, self.ema.model if self.ema else None
                evaluation = EvaluationOfThreshold(
                    period, self.evaluate, self.cfg.DATASETS.TEST, *models, self.cfg.OUTPUT_DIR
                )
                built.append(evaluation)
            else:
                built.append(hook)
        best = None
        if solver.BEST_METRIC:  # after the writers: an error in it loses no results
            model = self._model_of_metric()
            if comm.is_main_process():
                best = BestWeights(period, evaluation, model, self.cfg.OUTPUT_DIR, solver.BEST_METRIC)
                built.append(best)
        parts = [evaluation, best] if best else [evaluation]
        built.append(FinishedEvaluations(period, parts, self.cfg.OUTPUT_DIR))
        if solver.EARLY_STOPPING and period > 0:  # last: it may stop training
            if not solver.BEST_METRIC:
                raise ValueError("SOLVER.EARLY_STOPPING needs SOLVER.BEST_METRIC, such as bbox/AP")
            built.append(EarlyStopping(solver.EARLY_STOPPING, period, best, self.checkpointer, self.ema))
        return built

    def _model_of_metric(self) -> nn.Module:
        """The model that SOLVER.BEST_METRIC is measured with.

        Raises:
            ValueError: it cannot be measured.
        """
        if not self.cfg.DATASETS.TEST:
            raise ValueError(
                f"SOLVER.BEST_METRIC is {self.cfg.SOLVER.BEST_METRIC}, but DATASETS.TEST is empty, so nothing is "
                'measured: give data to evaluate on, or set SOLVER.BEST_METRIC "" and SOLVER.EARLY_STOPPING 0'
            )
        if not self.cfg.SOLVER.BEST_METRIC.startswith("ema/"):
            return self.checkpointer.model
        if self.ema is None:
            raise ValueError(
                f"SOLVER.BEST_METRIC is {self.cfg.SOLVER.BEST_METRIC}, which needs SOLVER.EMA.ENABLED True"
            )
        return self.ema.model

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the weights and, under "ema", their moving average."""
        results = dict(self.test(self.cfg, self.model))
        if self.ema is not None:
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
            averaged = self.test(cfg, self.ema.model)
            if averaged:
                results["ema"] = averaged
        self._last_eval_results = results
        return results

    def resume_from(self, checkpoint: str) -> None:
        """Resume from this checkpoint instead of the last one; it becomes the last one, copied to `OUTPUT_DIR` if it is
        elsewhere.

        Raises:
            ValueError: it holds only weights.
        """
        self.checkpointer.load(checkpoint)
        self.start_iter = self.iter + 1
        # Else a run that is killed before its next checkpoint would go on with what was abandoned.
        folder, name = os.path.split(checkpoint)
        if os.path.realpath(folder) != os.path.realpath(self.cfg.OUTPUT_DIR):
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        elif comm.is_main_process():
            self.checkpointer.tag_last_checkpoint(name)

    def train(self) -> dict[str, Any] | None:
        """Train until `SOLVER.MAX_ITER` or early stopping.

        Returns:
            The results of the last evaluation in the main process; None without one.

        Raises:
            RuntimeError: the processes have different start iterations, configs or seeds.
        """
        check_same_start({"iteration": self.start_iter, "seed": self.seed, **settings_of_training(self.cfg)})
        if isinstance(self.data_loader, TrainingLoader):
            self.data_loader.seed, self.data_loader.first_batch = self.seed, self.start_iter
        else:
            logging.getLogger(__name__).warning(
                "The training loader is a %s, so a resumed run will not continue with the next images in order. "
                "Use dino_d2.data.build_train_loader(cfg, mapper) for exact resuming",
                type(self.data_loader).__name__,
            )
        try:
            super().train()
        except StopTraining:
            logging.getLogger(__name__).info(
                "Stopping early: no improvement in %d evaluations (SOLVER.EARLY_STOPPING)",
                self.cfg.SOLVER.EARLY_STOPPING,
            )
            if not hasattr(self, "_last_eval_results"):  # resumed after it had stopped
                self.evaluate()
        return getattr(self, "_last_eval_results", None)

    @property
    def seed(self) -> int:
        """Seed of the run: `cfg.SEED`, or random if that is negative; saved in checkpoints."""
        return self._trainer.seed

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.seed = state_dict["seed"]
        if isinstance(self.scheduler, LRMultiplier):  # other schedulers may depend on the learning rates before
            groups, scheduler = self.optimizer.param_groups, self.scheduler
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, lr in zip(groups, scheduler.get_lr(), strict=True):
                group["lr"] = lr

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As in detectron2.

        Raises:
            ValueError: the batch cannot be scaled.
        """
        reference, images = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
        if reference < 0 or (reference and images % reference):
            raise ValueError(
                f"SOLVER.REFERENCE_WORLD_SIZE is {reference}; it must be the number of processes that the config was "
                f"made for, and divide SOLVER.IMS_PER_BATCH, {images}, or be 0, which scales nothing"
            )
        return DefaultTrainer.auto_scale_workers(cfg, num_workers)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        mapper = ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])
        return build_train_loader(cfg, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        mapper = ImageMapper(cfg, is_train=False, augmentations=[build_test_augmentation(cfg)])
        return build_test_loader(cfg, dataset_name, mapper)

    def build_writers(self) -> list[EventWriter]:
        """detectron2's writers, with `ProgressPrinter` first because it records values that the others write."""
        _, *others = super().build_writers()
        line = ProgressPrinter(self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH, self.model, self.optimizer)
        return [line, *others, *([WandbWriter(self.cfg)] if self.cfg.WANDB_PROJECT else [])]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of COCO, LVIS or Pascal VOC, according to the dataset's `evaluator_type`."""
        folder = os.path.join(cfg.OUTPUT_DIR, EVALUATION, dataset_name)
        return build_evaluator(dataset_name, APSettings.of_config(cfg), folder)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """As in detectron2; with `TEST.QUERY_METRICS` the default evaluators also measure the queries."""
        if cfg.TEST.QUERY_METRICS and evaluators is None:
            settings = APSettings.of_config(cfg)
            evaluators = [
                DatasetEvaluators([cls.build_evaluator(cfg, name), QueryEvaluator(name, model, settings=settings)])
                for name in cfg.DATASETS.TEST
            ]
        return super().test(cfg, model, evaluators)
