#!/usr/bin/env python3
"""Check a dataset in COCO format before training, and draw what the model will see."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = ["--json train.json --images train", "--json train.json --images train --config-file CONFIG --output FOLDER"]
DESCRIPTION = """\
Reports errors and oddities in a dataset in COCO format and, if there are no errors, draws FOLDER/contact_sheet.png:
augmented training samples with their objects and denoising queries. The exit code is 0 if training can start, else 1.\
"""
RECIPE = "dino_r50_4scale_12ep"
SAMPLES = 8


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="annotations in COCO format")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="folder of the images")
    parser.add_argument(
        "--config-file", default=RECIPE, metavar="CONFIG", help="for augmentation and denoising (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("output/check_dataset"), metavar="FOLDER")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from detectron2.utils.env import seed_all_rng

    from dino_d2.data import CocoFiles, class_names, load_config_for_files, register_datasets
    from dino_d2.data.contact_sheet import draw_contact_sheet
    from dino_d2.data.inspection import as_table, inspect_dataset, training_can_start
    from dino_d2.modeling.build import build_denoising
    from dino_d2.modeling.denoising import NoDenoising

    files = CocoFiles(args.json, args.images)
    with user_errors():
        cfg = load_config_for_files(args.config_file, args.opts, train=files, val=None)
        register_datasets(cfg)
        denoising = build_denoising(cfg)
    print(f"{args.json}: {len(class_names(cfg))} classes ({', '.join(class_names(cfg))}); reading the images …")
    findings = inspect_dataset(files, None if isinstance(denoising, NoDenoising) else denoising)
    print(as_table(findings) if findings else "nothing to report")
    if not training_can_start(findings):
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
