#!/usr/bin/env python3
"""Make a page that shows where a detector fails, or which of two is better."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dino_d2_cli import CommandParser, load_script, user_errors

EXAMPLES = [
    "output/mine",
    "output/first output/second -o comparison",
    "coco_instances_results.json --val-json val.json --val-images val -o report",
    "--weights dino_r50_4scale_12ep -o output/val2017    # evaluates it first",
]
DESCRIPTION = """\
Makes a folder with a page (index.html; it needs neither a server nor a network), every number (report.json) and every
plot (plots/). RUN is the OUTPUT_DIR of an evaluated run, or a file of detections in COCO's results format with
--val-json and --val-images. Two RUNs on the same images are compared. Without RUN, --weights are evaluated first; for
other options and settings of the evaluation use dino-d2 evaluate … TEST.REPORT True.\
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: RUN/report")
    parser.add_argument("--val-json", type=Path, metavar="FILE", help="in COCO format; default: the run's")
    parser.add_argument("--val-images", type=Path, metavar="FOLDER", help="images of --val-json")
    parser.add_argument("--dataset", metavar="NAME", help="which, if the run was evaluated on several")
    parser.add_argument("--weights", metavar="NAME_OR_PATH", help="evaluate these first")
    parser.add_argument("--config-file", metavar="CONFIG", help="recipe or config file (default: that of --weights)")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="default: the one with the highest F1")
    parser.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="for the 95 %% intervals, default %(default)s; 0: none"
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="detections of an image and class that count; default: the run's, or 100",
    )
    parser.add_argument("--robustness", type=Path, metavar="FOLDER", help="that of dino-d2 robustness, for its chapter")
    args = parser.parse_args(arguments)
    if (args.val_json is None) != (args.val_images is None):
        parser.error("--val-json and --val-images must be given together")
    if len(args.runs) > 2:
        parser.error("two RUNs can be compared, not more")
    if bool(args.runs) == bool(args.weights):
        parser.error("give a RUN, or --weights to evaluate")
    if args.config_file and not args.weights:
        parser.error("--config-file is for --weights")
    if args.robustness and len(args.runs) == 2:
        parser.error("--robustness is for the report on one RUN")
    if args.dataset and any(run.is_file() for run in args.runs):
        parser.error("--dataset is for the OUTPUT_DIR of a run; a file of detections has one dataset")
    if not args.output and (args.weights or len(args.runs) == 2 or args.runs[0].is_file()):
        parser.error("give -o FOLDER")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from dino_d2.data import CocoFiles
    from dino_d2.report.evaluated import find_evaluated
    from dino_d2.report.make import folder_of, make_comparison, make_report, read_robustness
    from dino_d2.report.numbers import NumbersOptions

    given = {} if args.max_dets is None else {"max_dets": args.max_dets}
    with user_errors():  # before an evaluation of hours
        options = NumbersOptions(threshold=args.threshold, resamples=args.resamples, **given)
    if args.weights:
        code = _evaluate(args)
        if code:
            return code
        args.runs = [args.output]
    with user_errors():
        files = CocoFiles(args.val_json, args.val_images) if args.val_json else None
        found = [replace(find_evaluated(run, files, args.dataset), **given) for run in args.runs]
        folder = args.output or folder_of(args.runs[0], found[0])
        if len(found) == 2:
            page = make_comparison(*found, folder, options)
        else:
            robustness = read_robustness(args.robustness, found[0]) if args.robustness else None
            page = make_report(found[0], folder, options, robustness)
    for name in found[0].datasets[1:]:
        print(f"also evaluated, not in this report: {name} (--dataset {name})")
    print(page)
    return 0


def _evaluate(args: argparse.Namespace) -> int | None:
    """Evaluate --weights; the results go to --output."""
    arguments = ["--eval-only", "--weights", args.weights, "--output", str(args.output)]
    if args.config_file:
        arguments += ["--config-file", args.config_file]
    if args.val_json:
        arguments += ["--val-json", str(args.val_json), "--val-images", str(args.val_images)]
    return load_script("train_net")([*arguments, "TEST.QUERY_METRICS", "True"])


if __name__ == "__main__":
    sys.exit(main())
