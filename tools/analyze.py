#!/usr/bin/env python3
"""Count parameters, FLOPs and activations of each stage of a detector."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = [
    "--config-file dino_r50_4scale_12ep --size 800 1333",
    "--config-file CONFIG --markdown MODEL.DINO.NUM_QUERIES 300",
]
DESCRIPTION = """\
Counts parameters, FLOPs and activations of each stage. One multiply-add counts as one FLOP. docs/cost.md compares the
numbers with the paper's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. `arguments`: the command line; None: that of the process."""
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--config-file", required=True, metavar="CONFIG", help="name of a recipe, or a config file")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[800, 1333],
        metavar=("HEIGHT", "WIDTH"),
        help="default 800 1333",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    args = parser.parse_args(arguments)
    height, width = args.size
    if min(args.size) < 1:
        parser.error(f"--size {height} {width}: both must be at least 1")
    from detectron2.modeling import build_model

    from dino_d2 import load_config
    from dino_d2.analysis import analyze, as_table

    # These do not change the counts of a prediction: no download of weights, no activation checkpointing, which cannot
    # be traced. And no score threshold: the number of queries above it depends on the image, and ours is black.
    neutral = ["MODEL.TIMM.PRETRAINED", "False", "MODEL.SWIN.CHECKPOINT", "False"]
    neutral += ["MODEL.DINO.QUERY_SCORE_THRESHOLD", "0.0"]
    with user_errors():
        model = build_model(load_config(args.config_file, [*args.opts, *neutral]))
    analysis = analyze(model, height, width)
    print(f"{args.config_file}: one image of {height} x {width} pixels\n")
    print(as_table(analysis, args.markdown))
    print("\nOne multiply-add counts as one FLOP. Denoising has parameters but is used only in training.")
    if analysis.not_counted:
        print("Not counted:", ", ".join(f"{name} ({times} calls)" for name, times in analysis.not_counted.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
