#!/usr/bin/env python3
"""Measure AP on corrupted images and at other sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = [
    "--weights output/mine -o output/mine/robustness",
    "--config-file CONFIG --weights MODEL.pth -o FOLDER --processes 4 [KEY VALUE ...]",
    "--weights output/mine -o FOLDER --corruptions fog,snow --strengths 1,3,5 --sizes none",
]
DESCRIPTION = """\
Measures AP on the test set: on clean images, with 15 corruptions (noise, blur, weather, compression) in 5 strengths,
and at sizes from a quarter to twice the configured one; docs/robustness.md explains them. That is up to 81 evaluations.
Each is kept in FOLDER when it is finished, so that a stopped command goes on where it was. The result of all is in
FOLDER/robustness.json."""
Item = TypeVar("Item")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--weights", required=True, help="name in the zoo, checkpoint, or folder of a run")
    parser.add_argument("--config-file", metavar="CONFIG", help="for a checkpoint without config.yaml beside it")
    parser.add_argument("--dataset", default="", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument("--val-json", type=Path, metavar="FILE", help="annotations of other data, in COCO format")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="images of --val-json")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--corruptions", type=_list_of(str), metavar="NAME,…|none", help="default: all 15")
    parser.add_argument("--strengths", type=_list_of(int), metavar="N,…", help="1 to 5; default: all")
    parser.add_argument(
        "--sizes", type=_list_of(float), metavar="X,…|none", help="default: 0.25,0.5,0.75,1.5,2; 1 is the clean images"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="evaluations at a time (default 1)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    args = parser.parse_args(arguments)
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: it must be at least 1")
    if (args.val_json is None) != (args.val_images is None):
        parser.error("--val-json and --val-images must be given together")
    if args.val_json and args.dataset:
        parser.error("--dataset and --val-json both name the data: give only one of them")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from dino_d2.data.datasets import VAL_NAME
    from dino_d2.evaluation.corruptions import CORRUPTIONS, STRENGTHS
    from dino_d2.evaluation.robustness import SIZES, Source, choose_cells, measure
    from dino_d2.evaluation.robustness_folder import RESULT, as_table, read_cells, summarize

    opts = list(args.opts)
    if args.val_json:
        opts += ["DATASETS.COCO_FORMAT", [[VAL_NAME, str(args.val_json), str(args.val_images)]]]
        opts += ["DATASETS.TEST", (VAL_NAME,)]
    source = Source(args.weights, args.config_file, tuple(opts), args.dataset)
    with user_errors():
        cells = choose_cells(
            list(CORRUPTIONS) if args.corruptions is None else args.corruptions,
            STRENGTHS if args.strengths is None else args.strengths,
            SIZES if args.sizes is None else args.sizes,
        )
        for cell, ap in measure(source, cells, args.output, args.processes):
            done = len(read_cells(args.output).keys() & set(cells))
            print(f"{cell.name}: AP {ap:.1f} ({done} of {len(cells)})", flush=True)
    print(as_table(summarize(read_cells(args.output))))
    print(args.output / RESULT)
    return 0


def _list_of(kind: Callable[[str], Item]) -> Callable[[str], list[Item]]:
    """Parse items separated by commas; "none" has no items."""

    def parse_list(text: str) -> list[Item]:
        try:
            return [] if text == "none" else [kind(item) for item in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text} is not a list such as 1,3") from error

    return parse_list


if __name__ == "__main__":
    sys.exit(main())
