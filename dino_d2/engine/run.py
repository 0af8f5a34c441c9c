"""The main function of each process of `tools/train_net.py`."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.config import find_config_file
from dino_d2.data import register_datasets
from dino_d2.evaluation.record import write_record
from dino_d2.report.make import report_on_run
from dino_d2.report.own_dataset import own_dataset, report_on_own_dataset
from dino_d2_cli import user_errors

from .checkpoints import BEST
from .choices import choose
from .run_folder import EVALUATION, LAST, check_run_folder, set_up_folder
from .trainer import DINOTrainer


def train_or_evaluate(args: Namespace) -> dict | None:
    """Train or evaluate.

    Args:
        args: of `tools/train_net.py`.

    Returns:
        The metrics of the (last) evaluation; None without one, and in all processes but the main one.
    """
    with user_errors():
        cfg = set_up(args)
        if args.eval_only:
            model = load_for_evaluation(cfg, args.resume)
        else:
            trainer = DINOTrainer(cfg)
            if args.resume_from:
                trainer.resume_from(args.resume_from)
            else:
                trainer.resume_or_load(resume=args.resume)
    if args.eval_only:
        results, weights = DINOTrainer.test(cfg, model), evaluated_file(cfg, args.resume)
    else:
        results, weights = trainer.train(), evaluated_file(cfg, resume=True)
        if own_dataset(cfg) or cfg.TEST.REPORT:
            results, weights = of_best_weights(trainer, results)
    if comm.is_main_process() and results:
        write_record(os.path.join(cfg.OUTPUT_DIR, EVALUATION), cfg, weights, results)
        if not args.eval_only and own_dataset(cfg):
            report_on_own_dataset(cfg, results)
        if cfg.TEST.REPORT:
            report_on_run(Path(cfg.OUTPUT_DIR), cfg.DATASETS.TEST)
        verify_results(cfg, results)
    return results


def set_up(args: Namespace) -> CfgNode:
    """Register the datasets, set up folder and logs, and return the frozen config."""
    chosen = comm.all_gather(choose(args) if comm.is_main_process() else None)[0]
    cfg = chosen.config()
    register_datasets(cfg, cfg.DATASETS.TEST if args.eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if comm.is_main_process() and not args.eval_only:
        check_run_folder(cfg, args.resume or bool(args.resume_from))
    cfg.freeze()
    comm.synchronize()
    set_up_folder(cfg, Namespace(**vars(args) | {"config_file": find_config_file(chosen.config_file)}))
    return cfg


def load_for_evaluation(cfg: CfgNode, resume: bool) -> nn.Module:
    model = DINOTrainer.build_model(cfg)
    checkpointer = DINOCheckpointer(model, cfg.OUTPUT_DIR, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


def evaluated_file(cfg: CfgNode, resume: bool) -> str:
    """The weights that `load_for_evaluation` loaded."""
    last = os.path.join(cfg.OUTPUT_DIR, LAST)
    if not (resume and PathManager.isfile(last)):
        return cfg.MODEL.WEIGHTS
    with PathManager.open(last) as file:
        return os.path.join(cfg.OUTPUT_DIR, file.read().strip())


def of_best_weights(trainer: DINOTrainer, results: dict | None) -> tuple[dict | None, str]:
    """Results of the best weights, and their file: those of the last evaluation, or else they are loaded and evaluated
    again. All processes must call this."""
    cfg = trainer.cfg
    path = os.path.join(cfg.OUTPUT_DIR, f"{BEST}.pth")
    # The main process wrote the file; the others might still see the one before.
    best = comm.all_gather(_iteration_of(path) if comm.is_main_process() else None)[0]
    is_last = best is not None and best >= trainer.iter and not cfg.SOLVER.BEST_METRIC.startswith("ema/")
    if not cfg.SOLVER.BEST_METRIC or best is None or is_last:
        return results, evaluated_file(cfg, resume=True)
    logging.getLogger(__name__).info("Evaluating the best weights, from iteration %d", best)
    model = trainer.checkpointer.model
    DINOCheckpointer(model, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True).load(path)
    return DINOTrainer.test(cfg, model), path


def _iteration_of(path: str) -> int | None:
    """The iteration of a checkpoint; None if there is none."""
    if not PathManager.isfile(path):
        return None
    return torch.load(PathManager.get_local_path(path), map_location="cpu", weights_only=True, mmap=True)["iteration"]
