#!/usr/bin/env python3
"""Check a data set in COCO's format before training on it, and draw what the model will see of it.

    tools/check_dataset.py --json train.json --images train [--config-file CONFIG] [--output FOLDER] [KEY VALUE ...]

Prints what is wrong or odd, and, unless something is wrong, draws FOLDER/contact_sheet.png: augmented training
samples with their objects and denoising queries. The exit code is 0 if training can start, else 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

from dino_d2.data import CocoFiles, class_names, load_config_for_files, register_datasets
from dino_d2.data.contact_sheet import draw_contact_sheet
from dino_d2.data.inspection import Finding, inspect_dataset, training_can_start
from dino_d2.modeling.build import build_denoising
from dino_d2.modeling.denoising import NoDenoising

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "dino_r50_4scale_12ep.yaml"
WIDTHS = [None, None, 34, 38, 40]  # of the table's columns, in characters
SAMPLES = 8


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="annotations in COCO's format")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="with the photographs")
    parser.add_argument("--config-file", default=str(RECIPE), help=f"augmentation, denoising (default {RECIPE.name})")
    parser.add_argument("--output", type=Path, default=Path("output/check_dataset"), metavar="FOLDER")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values to change")
    return parser.parse_args(arguments)


def as_table(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        examples = "\n".join(finding.examples) + ("\n…" if finding.count > len(finding.examples) else "")
        kind = finding.kind
        rows.append([kind.severity.value, finding.count, kind.what, examples, kind.advice])
    headers = ["", "count", "what", "for example", "what follows"]
    return tabulate(rows, headers, tablefmt="simple_grid", maxcolwidths=WIDTHS, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    files = CocoFiles(args.json, args.images)
    try:
        cfg = load_config_for_files(args.config_file, args.opts, train=files, val=None)
        register_datasets(cfg)
        denoising = build_denoising(cfg)
    except (OSError, ValueError) as error:
        print(f"check_dataset.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.json}: {len(class_names(cfg))} classes ({', '.join(class_names(cfg))}); reading the images …")
    findings = inspect_dataset(files, None if isinstance(denoising, NoDenoising) else denoising)
    print(as_table(findings) if findings else "nothing to report")
    if not training_can_start(findings):
        print("training cannot start: correct the errors first")
        return 1

    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    args.output.mkdir(parents=True, exist_ok=True)
    picture = args.output / "contact_sheet.png"
    draw_contact_sheet(cfg, denoising, SAMPLES).save(picture)
    print(f"training can start; {picture} shows what the model sees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
