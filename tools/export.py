#!/usr/bin/env python3
"""A trained model as a file that runs without this project.

    tools/export.py --format onnx --config-file CONFIG --weights MODEL.pth -o model.onnx [--half] [KEY VALUE ...]
    tools/export.py --format torch-export --config-file CONFIG --weights MODEL.pth -o model.pt2

The file takes images of every size, in batches of every size. Before it is kept it is run beside the model; if it finds
something else, there is an error and no file. docs/deployment.md says what goes in and what comes out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.modeling import build_model

from dino_d2 import load_config
from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.deploy.export import ExportError, export_onnx, export_program

FORMATS = {"onnx": export_onnx, "torch-export": export_program}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--weights", required=True, help="checkpoint made by training, or a converted one")
    parser.add_argument("-o", "--output", required=True, type=Path)
    parser.add_argument("--half", action="store_true", help="weights and maps in float16")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export for a command line (None: that of the process)."""
    args = parse(arguments)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of each operator that it does not fold
    if not Path(args.weights).is_file():
        sys.exit(f"--weights {args.weights}: there is no such file")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    try:
        DINOCheckpointer(model, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True).load(args.weights)
        report = FORMATS[args.format](cfg, model, args.output, args.half)
    except (ExportError, ValueError) as error:
        sys.exit(f"{args.config_file}: {error}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB; {report}")


if __name__ == "__main__":
    main()
