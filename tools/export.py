#!/usr/bin/env python3
"""Export a trained model to a file that runs without this project."""

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
    "--format onnx --weights output/mine -o model.onnx TEST.QUANTIZE int8    # 8-bit integers",
    "--format torch-export --config-file CONFIG --weights MODEL.pth -o model.pt2",
]
DESCRIPTION = """\
Exports a model to a file that takes images and batches of any size and runs without this project. The file is compared
with the model first; if the detections differ, it is deleted and the command fails. docs/deployment.md describes inputs
and outputs."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--format", required=True, choices=["onnx", "torch-export"])
    parser.add_argument("--weights", required=True, help="name in the zoo, checkpoint, or folder of a run")
    parser.add_argument("--config-file", metavar="CONFIG", help="for a checkpoint without config.yaml beside it")
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--half", action="store_true", help="weights and feature maps in float16")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from detectron2.utils.logger import setup_logger

    from dino_d2 import Detector
    from dino_d2.deploy.export import export_onnx, export_program

    setup_logger(name="dino_d2.deploy")  # prints each stage
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # warns about every operator that it does not fold
    formats = {"onnx": export_onnx, "torch-export": export_program}
    with user_errors():
        detector = Detector.from_pretrained(args.weights, args.config_file, device="cpu", overrides=args.opts)
        report = formats[args.format](detector.cfg, detector.model, args.output, args.half)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB; {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
