#!/usr/bin/env python3
"""Run a study: detectors on data sets with several seeds, in the same time. studies/plan.py explains its file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the package `studies`, which is not installed

from dino_d2_cli import CommandParser, user_errors  # noqa: E402

EXAMPLES = [
    "data studies/few_photos.yaml --from FOLDER    # makes the data; without --from it is downloaded",
    "measure studies/few_photos.yaml               # seconds per step, once, on an idle machine",
    "run studies/few_photos.yaml                   # what is left, one run after the other; start it twice for two",
    "status studies/few_photos.yaml",
    "table studies/few_photos.yaml",
    "plot studies/few_photos.yaml --output curves.png",
]
DESCRIPTION = """\
A run lasts for a budget of seconds at the pace that was measured alone, so it may share the machine with other work.
It can be killed at any time; the next run goes on from its last checkpoint. Results are JSON files in
studies/results/STUDY; data, checkpoints and logs are in output/studies. A result records the commit of the code, the
version of torch and digests of settings and data; different versions are not mixed. To go on with an unfinished study
after the code has changed, check out the commit of its results.\
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(EXAMPLES, DESCRIPTION)
    parser.add_argument("command", choices=["data", "measure", "run", "status", "table", "plot"])
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    parser.add_argument("--from", type=Path, metavar="FOLDER", dest="source", help="data: folder with raccoon/, cards/")
    parser.add_argument("--busy", action="store_true", help="measure: although the machine is busy")
    parser.add_argument("--replace", action="store_true", help="run: do results of other versions again")
    parser.add_argument("--any-version", action="store_true", help="table, plot: mix results of all versions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="plot: default curves.png beside the results")
    args = parser.parse_args(arguments)

    from studies import curves, data, plan, results, schedule

    with user_errors():
        for option in ("study", "source", "output"):  # the study's own paths are relative to the root
            path = getattr(args, option)
            setattr(args, option, path.resolve() if path else None)
        os.chdir(ROOT)
        study = plan.read_study(_relative(args.study))
        if args.command == "data":
            data.make(study, args.source)
            return
        if args.command == "measure":
            schedule.measure(study, results.code_of, args.busy)
        elif args.command == "run":
            try:
                schedule.run_study(study, results.code_of, args.replace)
            except FloatingPointError as error:
                sys.exit(f"{parser.prog}: {error}")
        elif args.command == "status":
            found = schedule.states(study, results.code_of)
            print("\n".join(map(str, [*found, schedule.what_is_left(study, found)])))
        else:
            usable = schedule.usable(study, args.any_version, lambda line: print(line, file=sys.stderr))
            if args.command == "table":
                print(results.table(study, usable))
            else:
                output = args.output or study.results / "curves.png"
                curves.draw(study, usable, output)
                print(output)


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    main()
