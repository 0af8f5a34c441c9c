#!/usr/bin/env python3
"""Train or evaluate a detector from a config file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import USER_ERROR, CommandParser

EXAMPLES = [
    "--data FOLDER --weights dino_r50_4scale_12ep --epochs 24 --output output/mine",
    "--config-file dino_r50_4scale_12ep --num-gpus 8",
    "--config-file CONFIG --resume        # begins a run, or goes on with the one in OUTPUT_DIR",
    "--config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth",
    "--config-file CONFIG --train-json train.json --train-images train --val-json val.json --val-images val",
]
DESCRIPTION = """\
Train or evaluate a detector. FOLDER holds photographs and annotations as COCO, Roboflow, YOLO or Pascal VOC lay them
out; what follows from it and from the other options is printed as KEY VALUE. CONFIG is the name of a recipe, or a file.
Data in COCO's format can be given as files; the classes come from them. Any config value can be set at the end:
SOLVER.IMS_PER_BATCH 4. Without a GPU it runs on the CPU; torchrun may start the processes, too."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of detectron2's `default_argument_parser` and ours.

    `train` and `val` are (annotation file, image folder), or None.
    """
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="photographs and annotations; docs/data.md")
    parser.add_argument(
        "--weights", metavar="NAME_OR_PATH", help="to start from: name in the zoo, checkpoint or its run"
    )
    parser.add_argument("--epochs", type=_at_least_one, metavar="N", help="length of the training (with --data: 24)")
    parser.add_argument(
        "--batch-size", type=_batch_size, metavar="N|auto", help="images of a step; auto: in parts that fit the memory"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where everything is written: OUTPUT_DIR")
    parser.add_argument("--config-file", metavar="CONFIG", help="name of a recipe, or a file (with --weights: theirs)")
    parser.add_argument("--eval-only", action="store_true", help="do not train")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT_DIR, if there is one")
    parser.add_argument("--resume-from", metavar="CHECKPOINT", help="go on from this file of the run, not its last one")
    parser.add_argument("--train-json", type=Path, metavar="FILE", help="annotations to train on, in COCO's format")
    parser.add_argument("--train-images", type=Path, metavar="FOLDER", help="with the photographs of --train-json")
    parser.add_argument("--val-json", type=Path, metavar="FILE", help="annotations to evaluate on; none: no evaluation")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="with the photographs of --val-json")
    parser.add_argument("--num-gpus", type=int, default=1, help="of this machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="default 1")
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT of machine 0")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    args = parser.parse_args(arguments)
    if not args.config_file and not args.weights:
        parser.error("what is trained? --weights NAME_OR_PATH to start from, or --config-file CONFIG")
    if args.data and (args.train_json or args.val_json):
        parser.error("--data and annotation files say the same: give one of them")
    if args.eval_only and (args.epochs or args.batch_size):
        parser.error("--epochs and --batch-size are for training")
    if isinstance(args.batch_size, int) and "SOLVER.IMS_PER_BATCH" in args.opts[::2]:
        parser.error("--batch-size and SOLVER.IMS_PER_BATCH say the same: give one of them")
    for which in ("train", "val"):
        files = getattr(args, f"{which}_json"), getattr(args, f"{which}_images")
        if (files[0] is None) != (files[1] is None):
            parser.error(f"--{which}-json and --{which}-images belong together: give both")
        setattr(args, which, files if files[0] else None)
    if args.val and not args.train and not args.eval_only:
        parser.error("--val-json without --train-json: give both, or --eval-only")
    if args.train and not args.val and args.eval_only:
        parser.error("--eval-only with --train-json: what is evaluated is --val-json and --val-images")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT, an address of machine 0")
    return args


def _at_least_one(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return number


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _at_least_one(text)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException

    from dino_d2.engine.processes import run_in_every_process
    from dino_d2.engine.run import train_or_evaluate

    available = torch.cuda.device_count()
    if args.num_gpus > max(available, 1):
        print(f"{Path(sys.argv[0]).name}: --num-gpus {args.num_gpus}: this machine has {available}", file=sys.stderr)
        return USER_ERROR
    try:
        run_in_every_process(train_or_evaluate, args)
    except ProcessExitedException as error:
        if error.exit_code == USER_ERROR:  # the process has said what is wrong
            return USER_ERROR
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
