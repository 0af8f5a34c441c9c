#!/usr/bin/env python3
"""Train or evaluate a detector from a config file.

    tools/train_net.py --config-file configs/dino_r50_4scale_12ep.yaml --num-gpus 8
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file CONFIG --resume        # begins, or goes on where the run in OUTPUT_DIR stopped
    torchrun --nproc-per-node 8 tools/train_net.py --config-file CONFIG

Your own data in COCO's format (docs/data.md); classes and their names come from the files:

    tools/train_net.py --config-file CONFIG --train-json train.json --train-images train \
        --val-json val.json --val-images val

Any config value can be given at the end: SOLVER.IMS_PER_BATCH 4. Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.data import CocoFiles, load_config_for_files, register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.engine.processes import run_in_every_process
from dino_d2.engine.run_folder import check_run_folder, set_up_folder


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """detectron2's options and `train`, `val`: the :class:`CocoFiles` that were given, or None."""
    parser = default_argument_parser(__doc__)
    parser.add_argument("--train-json", type=Path, metavar="FILE", help="annotations to train on, in COCO's format")
    parser.add_argument("--train-images", type=Path, metavar="FOLDER", help="with the photographs of --train-json")
    parser.add_argument("--val-json", type=Path, metavar="FILE", help="annotations to evaluate on; none: no evaluation")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="with the photographs of --val-json")
    parser.add_argument("--resume-from", metavar="CHECKPOINT", help="go on from this file of the run, not its last one")
    args = parser.parse_args(arguments)
    for which in ("train", "val"):
        annotations, images = getattr(args, f"{which}_json"), getattr(args, f"{which}_images")
        if (annotations is None) != (images is None):
            parser.error(f"--{which}-json and --{which}-images belong together: give both")
        setattr(args, which, CocoFiles(annotations, images) if annotations else None)
    if args.val and not args.train and not args.eval_only:
        parser.error("--val-json without --train-json: give both, or --eval-only")
    if args.train and not args.val and args.eval_only:
        parser.error("--eval-only with --train-json: what is evaluated is --val-json and --val-images")
    if not args.config_file:
        parser.error("--config-file is missing; the recipes are in configs/")
    available = torch.cuda.device_count()
    if args.num_gpus > max(available, 1):
        parser.error(f"--num-gpus {args.num_gpus}: this machine has {available}")
    return args


def setup(args: argparse.Namespace) -> CfgNode:
    try:
        cfg = load_config_for_files(args.config_file, args.opts, args.train, args.val)
        register_datasets(cfg)
        if comm.is_main_process() and not args.eval_only:
            check_run_folder(cfg, args.resume or bool(args.resume_from))
    except (OSError, ValueError) as error:
        sys.exit(f"train_net.py: {error}")
    cfg.freeze()
    comm.synchronize()
    set_up_folder(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    cfg = setup(args)
    if args.eval_only:
        model = DINOTrainer.build_model(cfg)
        checkpointer = DINOCheckpointer(model, cfg.OUTPUT_DIR, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return DINOTrainer.test(cfg, model)
    trainer = DINOTrainer(cfg)
    if args.resume_from:
        trainer.resume_from(args.resume_from)
    else:
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    run_in_every_process(main, parse())
