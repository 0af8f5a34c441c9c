"""Make the report of an evaluation, or the comparison of two, in a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dino_d2.data import stream_results

from .comparison import compare_numbers
from .evaluated import Evaluated, find_evaluated
from .numbers import NumbersOptions, report_numbers
from .page import write_comparison_page, write_page

FOLDER = "report"  # in OUTPUT_DIR

logger = logging.getLogger(__name__)


def make_report(
    evaluated: Evaluated, folder: Path, options: NumbersOptions, robustness: dict[str, Any] | None = None
) -> Path:
    """Write index.html, report.json and plots/ to `folder`; returns the page's path.

    Args:
        options: `max_dets` is replaced by the evaluation's.
        robustness: as written by tools/robustness.py.
    """
    with _named(evaluated.detections):
        numbers = report_numbers(
            evaluated.files,
            stream_results(evaluated.detections),
            evaluated.about,
            evaluated.title,
            replace(options, max_dets=evaluated.max_dets),
            evaluated.queries,
        )
    curves = {evaluated.title: evaluated.curves} if evaluated.curves else None
    return write_page(numbers, evaluated.files.images, folder, curves, robustness)


def make_comparison(first: Evaluated, second: Evaluated, folder: Path, options: NumbersOptions) -> Path:
    """Write the comparison of two evaluations on the same images; returns the page's path.

    Raises:
        ValueError: they were evaluated on different annotations, or with different limits of detections.
    """
    if first.files.annotations.read_bytes() != second.files.annotations.read_bytes():
        raise ValueError(
            f"{first.title} was evaluated on {first.files.annotations}, {second.title} on "
            f"{second.files.annotations}: only evaluations on the same annotations can be compared"
        )
    if first.max_dets != second.max_dets:
        raise ValueError(
            f"{first.title} counts {first.max_dets} detections per image, {second.title} {second.max_dets}: evaluate "
            "both with the same TEST.MAX_DETS_PER_IMAGE"
        )
    titles = [first.title, second.title] if first.title != second.title else [f"{first.title} {n}" for n in "AB"]
    with _named(first.detections, second.detections):
        numbers = compare_numbers(
            first.files,
            (titles[0], stream_results(first.detections)),
            (titles[1], stream_results(second.detections)),
            replace(options, max_dets=first.max_dets),
        )
    curves = {title: x.curves for title, x in zip(titles, (first, second), strict=True) if x.curves}
    return write_comparison_page(numbers, first.files.images, folder, curves)


def report_on_run(run: Path, datasets: Sequence[str]) -> None:
    """`TEST.REPORT`: write the report of the last evaluation on each dataset to `RUN/report`.

    What cannot be reported is logged: an evaluation of hours does not end in an error.
    """
    for name in datasets:
        folder = run / FOLDER / name if len(datasets) > 1 else run / FOLDER
        try:
            page = make_report(find_evaluated(run, dataset=name), folder, NumbersOptions())
        except (OSError, ValueError) as error:
            logger.warning("TEST.REPORT: no report on %s: %s", name, error)
            continue
        logger.info("Report on %s: %s", name, page)


@contextmanager
def _named(*files: Path) -> Iterator[None]:
    """Errors say which detections they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"report on {' and '.join(map(str, files))}: {error}") from error
