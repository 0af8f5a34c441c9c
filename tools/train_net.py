#!/usr/bin/env python3
"""Train or evaluate a detector from a config file.

    tools/train_net.py --config-file configs/dino_r50_4scale_12ep.yaml --num-gpus 8
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file CONFIG --resume

Any config value can be given at the end: SOLVER.IMS_PER_BATCH 4. Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import sys

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.config import load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    cfg = setup(args)
    if args.eval_only:
        model = DINOTrainer.build_model(cfg)
        checkpointer = DINOCheckpointer(model, cfg.OUTPUT_DIR, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return DINOTrainer.test(cfg, model)
    trainer = DINOTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser(__doc__).parse_args()
    if not arguments.config_file:
        sys.exit("--config-file is missing; the recipes are in configs/")
    available = torch.cuda.device_count()
    if arguments.num_gpus > max(available, 1):
        sys.exit(f"--num-gpus {arguments.num_gpus}: this machine has {available}")
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
