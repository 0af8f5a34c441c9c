#!/usr/bin/env python3
"""Train or evaluate a detector from a config file.

    tools/train_net.py --config-file configs/dino_r50_4scale_12ep.yaml --num-gpus 8
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file CONFIG --resume

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
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch

from dino_d2.data import CocoFiles, load_config_for_files, register_datasets
from dino_d2.engine import DINOTrainer


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """detectron2's options and `train`, `val`: the :class:`CocoFiles` that were given, or None."""
    parser = default_argument_parser(__doc__)
    parser.add_argument("--train-json", type=Path, metavar="FILE", help="annotations to train on, in COCO's format")
    parser.add_argument("--train-images", type=Path, metavar="FOLDER", help="with the photographs of --train-json")
    parser.add_argument("--val-json", type=Path, metavar="FILE", help="annotations to evaluate on; none: no evaluation")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="with the photographs of --val-json")
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
    except (OSError, ValueError) as error:
        sys.exit(f"train_net.py: {error}")
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    cfg = setup(args)
    if args.eval_only:
        model = DINOTrainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return DINOTrainer.test(cfg, model)
    trainer = DINOTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = parse()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
