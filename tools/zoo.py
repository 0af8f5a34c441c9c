#!/usr/bin/env python3
"""List the published weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dino_d2_cli import CommandParser, user_errors

DESCRIPTION = """\
Lists published weights with pre-training data, cost, and AP as reported by the publishers (COCO val2017; not measured
here). Use them with --weights NAME or MODEL.WEIGHTS dino://NAME. They are downloaded on first use and cached in
DINO_D2_CACHE."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(["", "dino_r50 # names that contain this", "--download dino_r50_4scale_12ep"], DESCRIPTION)
    parser.add_argument("name", nargs="?", default="", help="list names that contain this")
    parser.add_argument("--download", metavar="NAME", help="download weights into the cache")
    args = parser.parse_args(arguments)
    from tabulate import tabulate

    from dino_d2 import model_zoo
    from dino_d2.model_zoo.weights import cache_folder, cached_file, local_weights

    if args.download:
        with user_errors():
            print(local_weights(args.download))
        return 0
    rows = [
        [
            entry.name,
            entry.backbone,
            entry.pretraining,
            f"{entry.parameters:.0f}",
            f"{entry.gflops:.0f}",
            f"{entry.ap:.1f}",
            entry.publisher,
            entry.licence,
            "yes" if cached_file(entry).exists() else "",
        ]
        for entry in model_zoo.entries().values()
        if args.name in entry.name
    ]
    headers = ["name", "backbone", "pre-training", "M", "GFLOPs", "AP", "published by", "licence", "cached"]
    align = ["left"] * 3 + ["right"] * 3 + ["left"] * 3
    print(tabulate(rows, headers, colalign=align if rows else None, disable_numparse=True))
    print(
        "\nM: millions of parameters. GFLOPs: for an image of 800 x 1333. AP: COCO val2017, as reported by the "
        f"publishers, not measured here. Cache: {cache_folder()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
