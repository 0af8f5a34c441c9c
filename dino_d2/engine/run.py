"""What every process of `tools/train_net.py` does."""

from __future__ import annotations

from argparse import Namespace

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.data import CocoFiles, load_config_for_files, register_datasets
from dino_d2_cli import user_errors

from .run_folder import check_run_folder, set_up_folder
from .trainer import DINOTrainer


def train_or_evaluate(args: Namespace) -> dict | None:
    """
    Args:
        args: of `tools/train_net.py`.

    Returns:
        The metrics of the (last) evaluation; None without one, and in every process but the main one.
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
    return DINOTrainer.test(cfg, model) if args.eval_only else trainer.train()


def set_up(args: Namespace) -> CfgNode:
    """The frozen config of a run, its data sets registered, its folder and logs made."""
    train, val = (CocoFiles(*files) if files else None for files in (args.train, args.val))
    cfg = load_config_for_files(args.config_file, args.opts, train, val)
    register_datasets(cfg)
    if comm.is_main_process() and not args.eval_only:
        check_run_folder(cfg, args.resume or bool(args.resume_from))
    cfg.freeze()
    comm.synchronize()
    set_up_folder(cfg, args)
    return cfg


def load_for_evaluation(cfg: CfgNode, resume: bool) -> nn.Module:
    model = DINOTrainer.build_model(cfg)
    checkpointer = DINOCheckpointer(model, cfg.OUTPUT_DIR, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model
