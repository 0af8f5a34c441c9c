#!/usr/bin/env python3
"""Check a dataset in COCO format before training, and draw what the model will see."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = ["--data FOLDER", "--json train.json --images train --config-file CONFIG --output OUT"]
DESCRIPTION = """\
Reports errors and oddities in a dataset: a folder as dino-d2 train takes it, or a file in COCO format. If there are no
errors, it draws OUT/contact_sheet.png: augmented training samples with their objects and denoising queries. The exit
code is 0 if training can start, else 1."""
RECIPE = "dino_r50_4scale_12ep"
SAMPLES = 8


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="COCO, Roboflow, YOLO or Pascal VOC; docs/data.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="annotations in COCO format")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images, with --json")
    parser.add_argument(
        "--config-file", default=RECIPE, metavar="CONFIG", help="for augmentation and denoising (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("output/check_dataset"), metavar="OUT")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    args = parser.parse_args(arguments)
    if bool(args.data) == bool(args.json) or bool(args.json) != bool(args.images):
        parser.error("what is to be checked? Give --data, or --json and --images")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from detectron2.utils.env import seed_all_rng

    from dino_d2.data import CocoFiles, class_names, find_dataset, load_config_for_files, register_datasets
    from dino_d2.data.contact_sheet import draw_contact_sheet
    from dino_d2.data.inspection import report
    from dino_d2.modeling.build import build_denoising
    from dino_d2.modeling.denoising import NoDenoising

    with user_errors():
        if args.data:
            found = find_dataset(args.data, args.output)
            print(f"{args.data}: {found.layout}")
            print("".join(f"  {note}\n" for note in found.notes), end="")
            parts = [found.train, found.val]
        else:
            parts = [CocoFiles(args.json, args.images)]
        cfg = load_config_for_files(args.config_file, args.opts, train=parts[0], val=None)
        register_datasets(cfg)
        denoising = build_denoising(cfg)
    print(f"{len(class_names(cfg))} classes: {', '.join(class_names(cfg))}")
    input_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if report(parts, None if isinstance(denoising, NoDenoising) else denoising, input_size):
        print("training cannot start: fix the errors first")
        return 1

    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    args.output.mkdir(parents=True, exist_ok=True)
    picture = args.output / "contact_sheet.png"
    draw_contact_sheet(cfg, denoising, SAMPLES).save(picture)
    print(f"training can start; {picture} shows what the model sees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
