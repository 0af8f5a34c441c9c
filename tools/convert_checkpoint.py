#!/usr/bin/env python3
"""Convert published DINO weights to this project's, and back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = [
    "--source auto IN.pth OUT.pth --config-file dino_r50_4scale_12ep",
    "--to official IN.pth OUT.pth --config-file CONFIG [KEY VALUE ...]",
    "--source ema output/model_0004999.pth OUT.pth --config-file output/config.yaml",
]
DESCRIPTION = """\
Converts weights of the official code, detrex and MMDetection, and ImageNet backbones (torchvision's ResNets, the Swin
release, timm's Swin, MAE's ViTs) to start training from. `ema` extracts the moving average of the weights from a
checkpoint of your own training run. Weights listed by dino-d2 zoo are converted automatically.

CONFIG is the config that will use the weights; unexpected or missing names and different shapes are errors. detrex's
weights need MODEL.DINO.SHARE_HEADS False MODEL.DINO.POS_TEMPERATURE 10000.0 MODEL.DINO.POS_OFFSET -0.5; MMDetection's
need MODEL.DINO.SHARE_HEADS False, and its "improved" R-50 the other two as well."""
SOURCES = ("official", "detrex", "mmdet")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--source", choices=[*SOURCES, "backbone", "ema", "auto"], help="where IN comes from")
    direction.add_argument("--to", choices=["official"], help="write OUT with the official code's names")
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--config-file", required=True, metavar="CONFIG", help="name of a recipe, or a config file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config values to change")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from detectron2.modeling import build_model
    from detectron2.utils.file_io import PathManager

    from dino_d2 import load_config
    from dino_d2.checkpoint import read_published, to_ours, to_published
    from dino_d2.checkpoint.convert import summarize
    from dino_d2.checkpoint.files import average_of, write_checkpoint

    with user_errors():
        if not Path(args.input).is_file():
            raise FileNotFoundError(f"{args.input} does not exist")
        cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
        notes = []
        try:
            if args.source == "ema":
                state = average_of(args.input)
            else:
                given, model = read_published(args.input), build_model(cfg)
                result = to_published(given.state, args.to, model) if args.to else to_ours(given, args.source, model)
                state, notes = result.state, result.notes
        except ValueError as error:
            raise ValueError(f"{args.input}: {error}") from error
        folder, name = os.path.split(args.output)
        PathManager.mkdirs(folder or ".")
        write_checkpoint({"model": state}, folder, name)
    print(f"{args.output}: {len(state)} tensors")
    if notes:
        print(summarize(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
