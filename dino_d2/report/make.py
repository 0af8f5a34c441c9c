"""Make the report of an evaluation, or the comparison of two, in a folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dino_d2.data import stream_results
from dino_d2.digest import sha256_of
from dino_d2.evaluation.robustness_folder import RESULT, SETTINGS, SHEET
from dino_d2.evaluation.settings import require_hotcoco

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
        robustness: from :func:`read_robustness`.
    """
    require_hotcoco("the report")
    with _named(evaluated.detections):
        numbers = report_numbers(
            evaluated.files,
            stream_results(evaluated.detections),
            evaluated.about,
            evaluated.title,
            replace(options, max_dets=evaluated.max_dets),
            evaluated.queries,
        )
    numbers["left_out"] += evaluated.notes
    curves = {evaluated.title: evaluated.curves} if evaluated.curves else {}
    return write_page(numbers, evaluated.files.images, folder, curves, robustness)


def make_comparison(first: Evaluated, second: Evaluated, folder: Path, options: NumbersOptions) -> Path:
    """Write the comparison of two evaluations on the same images; returns the page's path.

    Raises:
        ValueError: they were evaluated on different annotations, or with different limits of detections.
    """
    require_hotcoco("the report")
    if first.files.annotations.read_bytes() != second.files.annotations.read_bytes():
        raise ValueError(
            f"{first.title} was evaluated on {first.files.annotations}, {second.title} on "
            f"{second.files.annotations}: only evaluations on the same annotations can be compared"
        )
    if first.max_dets != second.max_dets:
        raise ValueError(
            f"{first.title} counts {first.max_dets} detections per image and class, {second.title} {second.max_dets}: "
            "give --max-dets, or evaluate both with the same TEST.MAX_DETS_PER_IMAGE"
        )
    titles = [first.title, second.title]
    if titles[0] == titles[1]:
        titles = [str(first.detections), str(second.detections)]
    with _named(first.detections, second.detections):
        numbers = compare_numbers(
            first.files,
            (titles[0], stream_results(first.detections)),
            (titles[1], stream_results(second.detections)),
            replace(options, max_dets=first.max_dets),
        )
    curves = {title: x.curves for title, x in zip(titles, (first, second), strict=True) if x.curves}
    return write_comparison_page(numbers, first.files.images, folder, curves)


def folder_of(run: Path, evaluated: Evaluated) -> Path:
    """Where the report on a run lies by default: `RUN/report`, or a folder in it for each of several datasets."""
    folder = run / FOLDER
    return folder / evaluated.datasets[0] if len(evaluated.datasets) > 1 else folder


def report_on_run(run: Path, datasets: Sequence[str]) -> None:
    """`TEST.REPORT`: write the report of the last evaluation on each dataset.

    What cannot be reported is logged: an evaluation of hours does not end in an error.
    """
    for name in datasets:
        try:
            evaluated = find_evaluated(run, dataset=name)
            page = make_report(evaluated, folder_of(run, evaluated), NumbersOptions())
        except (ImportError, OSError, ValueError) as error:
            logger.warning("TEST.REPORT: no report on %s: %s", name, error)
            continue
        logger.info("Report on %s: %s", name, page)


def read_robustness(path: Path, evaluated: Evaluated) -> dict[str, Any]:
    """The result of `dino-d2 robustness`, and under "sheet" the path of its picture.

    Args:
        path: its folder.

    Raises:
        FileNotFoundError: there is no result.
        ValueError: it was measured on other annotations.
    """
    result, settings = path / RESULT, path / SETTINGS
    for file in (result, settings):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: --robustness is the folder of dino-d2 robustness")
    digest = sha256_of(evaluated.files.annotations)
    if json.loads(settings.read_text())["annotations"] != digest:
        raise ValueError(f"{path} was measured on other annotations than {evaluated.files.annotations}")
    return json.loads(result.read_text()) | {"sheet": str(path / SHEET)}


@contextmanager
def _named(*files: Path) -> Iterator[None]:
    """Errors say which detections they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"report on {' and '.join(map(str, files))}: {error}") from error
