#!/usr/bin/env python3
"""A trained model as a file that runs without this project."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = [
    "--format onnx --weights dino_r50_4scale_12ep -o dino.onnx",
    "--format onnx --config-file CONFIG --weights MODEL.pth -o model.onnx [--half] [KEY VALUE ...]",
    "--format torch-export --config-file CONFIG --weights MODEL.pth -o model.pt2",
]
DESCRIPTION = """\
Writes a model as a file that takes images of every size, in batches of every size, and runs without this project.
Before it is kept it is run beside the model; if it finds something else, there is an error and no file.
docs/deployment.md says what goes in and what comes out."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--format", required=True, choices=["onnx", "torch-export"])
    parser.add_argument("--weights", required=True, help="name in the zoo, checkpoint, or folder of a training")
    parser.add_argument("--config-file", metavar="CONFIG", help="of a checkpoint that has no config.yaml beside it")
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--half", action="store_true", help="weights and maps in float16")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from dino_d2 import Detector
    from dino_d2.deploy.export import export_onnx, export_program

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of each operator that it does not fold
    formats = {"onnx": export_onnx, "torch-export": export_program}
    with user_errors():
        detector = Detector.from_pretrained(args.weights, args.config_file, device="cpu", overrides=args.opts)
        report = formats[args.format](detector.cfg, detector.model, args.output, args.half)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB; {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
