#!/usr/bin/env python3
"""Open a web page that finds objects in your photographs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = (
    "--weights dino_r50_4scale_12ep",
    "--weights output/mine/model_final.pth --tile 400",
)
DESCRIPTION = """\
A page on this machine alone: upload photographs, move the threshold, choose classes, take the boxes as COCO JSON.
Nothing leaves the machine. Needs pip install 'dino-d2[app]'."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--weights", required=True, help="name in the zoo, checkpoint, or folder of a training")
    parser.add_argument("--config-file", metavar="CONFIG", help="of a checkpoint that has no config.yaml beside it")
    parser.add_argument("--device", help="such as cpu (default: the GPU if there is one)")
    parser.add_argument("--port", type=int, default=7860, help="or the next free one (default 7860)")
    parser.add_argument("--tile", type=int, default=0, metavar="PIXELS", help="at first (default 0: whole images)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    with user_errors():
        from dino_d2 import Detector
        from dino_d2.app import build_page, launch  # before the weights are loaded: Gradio may be missing

        detector = Detector.from_pretrained(args.weights, args.config_file, device=args.device, overrides=args.opts)
        name = "/".join(Path(args.weights).parts[-2:])
        page = build_page(detector, name, args.tile)
        address = launch(page, args.port)
    print(f"{name} is at {address} — Ctrl-C stops it", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are removed then, too
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
