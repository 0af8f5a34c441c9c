#!/usr/bin/env python3
"""Plot the curves of training runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

EXAMPLES = ["output/first output/second -o curves.png"]
DESCRIPTION = """\
Plots the curves of training runs, one colour per run. RUN is an OUTPUT_DIR, or its metrics.json. Only recorded values
are plotted."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    from dino_d2.report.curves import draw, read_curves

    with user_errors():
        runs = {str(run): read_curves(run) for run in args.runs}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
