"""Train and evaluate one run of a study; measure what a step costs."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng

from dino_d2.checkpoint.files import write_atomically, write_checkpoint
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.meta_arch.dino import DINO

from . import peers  # noqa: F401 their registration

EVALUATIONS = "evaluations.json"  # in the folder of a run: metrics by iteration
FINAL = "model_final"  # and model_final_ema
LOGGERS = ("detectron2", "dino_d2", "fvcore")
HEADLINES = ("AP", "AP50", "AP75")  # 0 without detections
NMS, NMS_THRESHOLD = "nms", 0.6  # a second evaluation of DINO tells what dropping duplicates brings, and voting if set
WARM_UP, TIMED = 3, 10  # steps of one measurement

Metrics = dict[str, float | None]


class StudyTrainer(DINOTrainer):
    """`DINOTrainer` that evaluates at given iterations.

    Args:
        cfg: frozen, with registered data sets.
        others: hooks that take the place of detectron2's periodic evaluation.
    """

    def __init__(self, cfg: CfgNode, others: Sequence[HookBase]):
        self._others = others
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        built: list[HookBase | None] = []
        for hook in super().build_hooks():
            built += self._others if isinstance(hook, hooks.EvalHook) else [hook]
        return built

    def evaluate(self) -> dict[str, Any]:
        """As `DINOTrainer`; DINO without `MODEL.DINO.NMS_THRESHOLD` also with it, under "nms"."""
        results = super().evaluate()
        model = self.ema.model if self.ema else self.model
        if isinstance(model, DINO) and model.inference.nms_threshold == 1:
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.TEST.QUERY_METRICS = False
            model.inference.nms_threshold = NMS_THRESHOLD
            try:
                results[NMS] = self.test(cfg, model)
            finally:
                model.inference.nms_threshold = 1.0
        return results


class EvaluateAt(HookBase):
    """Evaluates after given numbers of iterations and keeps the metrics in a file; a resumed run makes up for
    evaluations that its checkpoint is past and that were not finished.

    Args:
        iterations: after which to evaluate.
        file: metrics by iteration, JSON.
        say: called with each evaluation.
    """

    def __init__(self, iterations: Sequence[int], file: Path, say: Callable[[int, Metrics], None]):
        self.iterations, self.file, self.say = frozenset(iterations), file, say

    def before_train(self) -> None:
        self._evaluate_after(self.trainer.start_iter)

    def after_step(self) -> None:
        self._evaluate_after(self.trainer.iter + 1)

    def _evaluate_after(self, done: int) -> None:
        found = read_evaluations(self.file)
        if done not in self.iterations or done in found:
            return
        with redirect_stdout(io.StringIO()):  # COCO's own summary
            found[done] = as_metrics(self.trainer.evaluate())
        text = json.dumps(found, indent=1)
        write_atomically(str(self.file.parent), self.file.name, lambda file: file.write(text.encode()))
        self.say(done, found[done])


class Stopwatch(HookBase):
    """Measures the seconds per step after some steps to warm up."""

    def __init__(self, warm_up: int):
        self.warm_up, self.start, self.steps = warm_up, 0.0, 0

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.warm_up:
            self.start = time.perf_counter()
        self.steps = self.trainer.iter + 1 - self.warm_up

    def after_train(self) -> None:
        self.seconds_per_step = (time.perf_counter() - self.start) / self.steps


def train(cfg: CfgNode, iterations: Sequence[int], say: Callable[[int, Metrics], None]) -> dict[int, Metrics]:
    """Train, or go on from the last checkpoint in `OUTPUT_DIR`.

    Resumed or not, the results are the same.

    Args:
        iterations: after which to evaluate, the last of them `SOLVER.MAX_ITER`.
        say: called with each evaluation.

    Returns:
        the metrics of each evaluation.
    """
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / EVALUATIONS
    with _logs_in(folder / "log.txt"), _registered(cfg):
        seed_all_rng(cfg.SEED)
        trainer = StudyTrainer(cfg, [EvaluateAt(iterations, file, say)])
        trainer.resume_or_load(resume=True)
        trainer.train()
    found = read_evaluations(file)
    return {done: found[done] for done in iterations}


def keep_weights(folder: Path) -> None:
    """Of the checkpoints of a finished run, keep the final weights, without the optimizer's state."""
    for checkpoint in folder.glob("model_*.pth"):
        if not checkpoint.name.startswith(FINAL):
            checkpoint.unlink()
    model = torch.load(folder / f"{FINAL}.pth", map_location="cpu", weights_only=True)["model"]
    write_checkpoint({"model": model}, str(folder), f"{FINAL}.pth")


def seconds_per_step(cfg: CfgNode) -> float:
    """Mean time of the steps of a short run after the first `WARM_UP`, with everything that a step needs, data too."""
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(WARM_UP)
    with _logs_in(folder / "log.txt"), _registered(cfg):
        seed_all_rng(cfg.SEED)
        trainer = StudyTrainer(cfg, [watch])
        trainer.checkpointer.save_to_disk = False
        trainer.resume_or_load(resume=False)
        trainer.train()
    return watch.seconds_per_step


def read_evaluations(file: Path) -> dict[int, Metrics]:
    """Metrics by iteration; empty if there is no file."""
    return {int(done): found for done, found in json.loads(file.read_text()).items()} if file.is_file() else {}


def as_metrics(results: dict[str, Any]) -> Metrics:
    """Numbers of an evaluation for JSON: of the moving average of the weights, if the run has one.

    Without any detection AP is 0; other metrics that are not defined are None. Those of the queries
    (`TEST.QUERY_METRICS`) are among them, and AP with NMS as AP_nms, AP50_nms, AP75_nms.
    """
    groups = results.get("ema", results)
    found = _numbers(groups["bbox"]) | _numbers(groups.get("queries", {}))
    with_nms = _numbers(results.get(NMS, {}).get("bbox", {}))
    return found | {f"{name}_{NMS}": with_nms[name] for name in HEADLINES if name in with_nms}


def _numbers(of_group: dict[str, float]) -> Metrics:
    nothing = math.isnan(of_group.get("AP", 0))
    return {
        name: (0.0 if nothing and name in HEADLINES else None) if math.isnan(value) else round(float(value), 4)
        for name, value in of_group.items()
    }


@contextmanager
def _registered(cfg: CfgNode) -> Iterator[None]:
    register_datasets(cfg)
    try:
        yield
    finally:
        for name, *_ in cfg.DATASETS.COCO_FORMAT:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@contextmanager
def _logs_in(file: Path) -> Iterator[None]:
    """Write the log to the file only, so that the console has a line per evaluation."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate, logger.handlers = False, [handler]
    try:
        yield
    finally:
        handler.close()
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
