#!/usr/bin/env python3
"""Start a local web page that detects objects in your images."""

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
A local web page: upload images, set the score threshold, select classes, download the boxes as COCO JSON. Nothing
leaves this machine. Needs pip install 'dino-d2[app]'."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--weights", required=True, help="name in the zoo, checkpoint, or folder of a run")
    parser.add_argument("--config-file", metavar="CONFIG", help="for a checkpoint without config.yaml beside it")
    parser.add_argument("--device", help="such as cpu (default: the GPU if there is one)")
    parser.add_argument("--port", type=int, default=7860, help="first port to try (default 7860)")
    parser.add_argument("--tile", type=int, default=0, metavar="PIXELS", help="initial tile size (default 0: no tiles)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    with user_errors():
        from dino_d2 import Detector
        from dino_d2.app import build_page, launch  # before loading weights: Gradio may be missing

        detector = Detector.from_pretrained(args.weights, args.config_file, device=args.device, overrides=args.opts)
        name = "/".join(Path(args.weights).parts[-2:])
        page = build_page(detector, name, args.tile)
        address = launch(page, args.port)
    print(f"{name} is running at {address} (press Ctrl-C to stop)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
