#!/usr/bin/env python3
"""Train or evaluate a detector from a config file.

    tools/train_net.py --config-file configs/dino_r50_4scale_12ep.yaml --num-gpus 8
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file CONFIG --resume
    torchrun --nproc-per-node 8 tools/train_net.py --config-file CONFIG

Any config value can be given at the end: SOLVER.IMS_PER_BATCH 4. Without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.config import load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.engine.run_folder import check_run_folder


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    cfg.freeze()
    if comm.is_main_process() and not args.eval_only:
        check_run_folder(cfg, args.resume or bool(args.resume_from))
    comm.synchronize()
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
    if args.resume_from:
        trainer.resume_from(args.resume_from)
    else:
        trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: argparse.Namespace) -> None:
    """`main` in every process: those that torchrun started, or those that detectron2 starts."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        try:
            main(args)
        finally:
            dist.destroy_process_group()
        return
    available = torch.cuda.device_count()
    if args.num_gpus > max(available, 1):
        sys.exit(f"--num-gpus {args.num_gpus}: this machine has {available}")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    parser = default_argument_parser(__doc__)
    parser.add_argument("--resume-from", metavar="CHECKPOINT", help="go on from this file of the run, not its last one")
    arguments = parser.parse_args()
    if not arguments.config_file:
        sys.exit("--config-file is missing; the recipes are in configs/")
    run(arguments)
