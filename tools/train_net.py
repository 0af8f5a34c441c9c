#!/usr/bin/env python3
"""Train or evaluate a detector."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import USER_ERROR, CommandParser

EXAMPLES = [
    "--data FOLDER --weights dino_r50_4scale_12ep --epochs 24 --output output/mine",
    "--config-file dino_r50_4scale_12ep --num-gpus 8",
    "--config-file CONFIG --resume        # starts a run, or resumes the one in OUTPUT_DIR",
    "--config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth",
    "--config-file CONFIG --train-json train.json --train-images train --val-json val.json --val-images val",
]
DESCRIPTION = """\
Trains or evaluates a detector. FOLDER has images and annotations in the layout of COCO, Roboflow, YOLO or Pascal VOC;
the settings derived from it and from other options are printed as KEY VALUE. CONFIG is the name of a recipe, or a
config file. Data in COCO format can also be given as files; the classes are taken from them. Any config value can be
set at the end: SOLVER.IMS_PER_BATCH 4. Without a GPU it runs on the CPU. Processes can also be started with torchrun.\
"""
EVALUATION_EXAMPLES = [
    "--weights dino_r50_4scale_12ep       # on COCO",
    "--weights output/mine --data FOLDER",
    "--weights output/mine --val-json val.json --val-images val --output output/mine_on_val",
    "--config-file dino_r50_4scale_12ep MODEL.WEIGHTS dino_r50.pth TEST.QUERY_METRICS True",
]
EVALUATION_DESCRIPTION = """\
Measures AP of weights on DATASETS.TEST of the config, or on data that are given: FOLDER has images and annotations in
the layout of COCO, Roboflow, YOLO or Pascal VOC; files are in COCO format. CONFIG is the name of a recipe, or a config
file. Any config value can be set at the end: MODEL.DINO.NUM_QUERIES 100. Without a GPU it runs on the CPU.\
"""
ONLY_EVALUATE = "--eval-only"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of detectron2's `default_argument_parser` and ours.

    `train` and `val` are (annotation file, image folder), or None. The help for `--eval-only` leaves out what is for
    training.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    evaluation = ONLY_EVALUATE in arguments

    def of_training(text: str) -> str:
        return argparse.SUPPRESS if evaluation else text

    if evaluation:
        typed = f"{ONLY_EVALUATE} " if ONLY_EVALUATE in sys.argv else ""  # dino-d2 evaluate needs none
        parser = CommandParser([typed + example for example in EVALUATION_EXAMPLES], EVALUATION_DESCRIPTION)
    else:
        parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images and annotations; see docs/data.md")
    what = "name in the zoo, checkpoint, or folder of a run"
    parser.add_argument("--weights", metavar="NAME_OR_PATH", help=what if evaluation else f"initial weights: {what}")
    length = "length of the run (default with --data: 24)"
    parser.add_argument("--epochs", type=_at_least_one, metavar="N", help=of_training(length))
    minutes = "length in time instead: some steps are measured first"
    parser.add_argument("--minutes", type=_minutes, metavar="M", help=of_training(minutes))
    batch = "images per step; auto: accumulated to fit memory"
    parser.add_argument("--batch-size", type=_batch_size, metavar="N|auto", help=of_training(batch))
    parser.add_argument("--output", metavar="FOLDER", help="where everything is written (OUTPUT_DIR)")
    parser.add_argument("--config-file", metavar="CONFIG", help="recipe or config file (default: that of --weights)")
    parser.add_argument(ONLY_EVALUATE, action="store_true", help=of_training("do not train"))
    resume = "evaluate its last checkpoint" if evaluation else "continue it"
    parser.add_argument("--resume", action="store_true", help=f"if there is a run in OUTPUT_DIR, {resume}")
    checkpoint = "continue from this checkpoint instead of the last"
    parser.add_argument("--resume-from", metavar="CHECKPOINT", help=of_training(checkpoint))
    copies = "look at six copies of each image: more accurate, and six times as slow"
    parser.add_argument("--augment", action="store_true", help=copies if evaluation else argparse.SUPPRESS)
    for_training = "annotations for training, in COCO format"
    parser.add_argument("--train-json", type=Path, metavar="FILE", help=of_training(for_training))
    parser.add_argument("--train-images", type=Path, metavar="FOLDER", help=of_training("images of --train-json"))
    for_evaluation = "annotations, in COCO format" if evaluation else "annotations for evaluation; omit for none"
    parser.add_argument("--val-json", type=Path, metavar="FILE", help=for_evaluation)
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="images of --val-json")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs to use on this machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="default 1")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://HOST:PORT on machine 0")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    args = parser.parse_args(arguments)
    _refuse_contradictions(args, parser)
    for which in ("train", "val"):
        json_file, images = getattr(args, f"{which}_json"), getattr(args, f"{which}_images")
        setattr(args, which, (json_file, images) if json_file else None)
    return args


def _refuse_contradictions(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with a message if options lack others that they need, or exclude each other."""
    if not args.config_file and not args.weights:
        start = "" if args.eval_only else " to start from"
        parser.error(f"give --weights NAME_OR_PATH{start}, or --config-file CONFIG")
    if args.data and (args.train_json or args.val_json):
        parser.error("--data conflicts with annotation files: give only one of them")
    if args.eval_only and (args.epochs or args.minutes or args.batch_size or args.resume_from):
        parser.error("--epochs, --minutes, --batch-size and --resume-from are for training: remove them")
    if args.augment and not args.eval_only:
        parser.error("--augment is for evaluation: remove it")
    if args.epochs and args.minutes:
        parser.error("--epochs and --minutes both set the length: give only one of them")
    if isinstance(args.batch_size, int) and "SOLVER.IMS_PER_BATCH" in args.opts[::2]:
        parser.error("--batch-size conflicts with SOLVER.IMS_PER_BATCH: give only one of them")
    for which in ("train", "val"):
        if (getattr(args, f"{which}_json") is None) != (getattr(args, f"{which}_images") is None):
            parser.error(f"--{which}-json and --{which}-images must be given together")
    if args.val_json and not args.train_json and not args.eval_only:
        parser.error("--val-json needs --train-json, or --eval-only")
    if args.train_json and not args.val_json and args.eval_only:
        parser.error("--eval-only uses --val-json and --val-images, not --train-json")
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT with an address of machine 0")


def _at_least_one(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return number


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return minutes


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
        print(f"{Path(sys.argv[0]).name}: --num-gpus {args.num_gpus}: only {available} here", file=sys.stderr)
        return USER_ERROR
    try:
        run_in_every_process(train_or_evaluate, args)
    except ProcessExitedException as error:
        if error.exit_code == USER_ERROR:  # the process has printed the error
            return USER_ERROR
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
