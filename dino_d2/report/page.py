"""The page of a report: an index.html without a server or a network, and its numbers and plots beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .curves import LOGARITHMIC, PANELS, Curve
from .errors import BACKGROUND
from .gallery import lowest_drawn
from .numbers import FORMAT
from .pictures import data_url, embed_pictures
from .plots import draw_comparison, draw_report, layer_ap, most_confused, row_totals, size_ap

LARGEST_PAGE = 10_000_000  # bytes
FOR_NOTES = 4_000  # bytes of it, for what is said about pictures left out
SHEET_WIDTH = 1200  # pixels at most, of the picture of the corruptions
POINTS = 300  # at most, of a training curve
TEMPLATES = Environment(
    loader=PackageLoader("dino_d2.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}

Report = dict[str, Any]


def write_page(
    numbers: Report,
    images: Path,
    folder: Path,
    curves: dict[str, dict[str, Curve]] | None = None,
    robustness: Report | None = None,
) -> Path:
    """Write `index.html`, `report.json` and `plots/*.png` of one detector.

    Args:
        numbers: from :func:`dino_d2.report.numbers.report_numbers`.
        images: the folder that the `file` of every image is relative to. Pictures may be missing: the page says so.
        folder: made if it does not exist; files of these names are replaced.
        curves: run -> what :func:`dino_d2.report.curves.read_curves` returns.
        robustness: {"corruptions": {name: [AP at strengths 1 to 5]}, "clean": AP, "mPC": mean AP under corruption,
            "rPC": mPC in percent of clean, "sizes": {scale: AP}}, and, to be shown, "sheet": path of a picture of
            the corruptions.

    Returns:
        the path of `index.html`. Images that would make it larger than 10 MB are left out, which it says.

    Raises:
        ValueError: the report is of another format, or has a number that is not finite.
    """
    curves = curves or {}
    confused, totals = most_confused(numbers), row_totals(numbers)
    keys = ("classes", "threshold", "f1", "calibration", "images", "cases", "label_errors")

    def for_scripts(report: Report) -> Report:
        return {key: report[key] for key in keys} | {
            "confusion": {
                "classes": confused,
                "cells": _cells(numbers, confused),
                "totals": [totals[index] for index in (*confused, BACKGROUND)],
            },
            "lowest": lowest_drawn(report["threshold"]["score"]),
            "layers": layer_ap(numbers),
            "sizes": size_ap(robustness or {}),
            **_of_training(curves),
        }

    tested = dict(robustness) if robustness else None
    sheet = tested.pop("sheet", None) if tested else None
    picture = data_url(Path(sheet), SHEET_WIDTH) if sheet else None
    unread = [f"The picture of the corruptions, {sheet}, could not be read."] if sheet and not picture else []
    report = numbers | {"curves": curves, "robustness": tested, "left_out": [*numbers["left_out"], *unread]}
    path = _write("report.html", report, for_scripts, images, folder, sheet=picture)
    draw_report(numbers, folder / "plots", curves, robustness)
    return path


def write_comparison_page(
    numbers: Report, images: Path, folder: Path, curves: dict[str, dict[str, Curve]] | None = None
) -> Path:
    """Write `index.html`, `report.json` and `plots/*.png` of two detectors.

    Args:
        numbers: from :func:`dino_d2.report.comparison.compare_numbers`.
        images, folder, curves: as in :func:`write_page`.

    Raises:
        ValueError: as in :func:`write_page`.
    """
    curves = curves or {}
    keys = ("names", "thresholds", "images", "better", "worse")

    def for_scripts(report: Report) -> Report:
        classes = [{"name": x["name"]} for x in report["classes"]]
        lowest = lowest_drawn(*report["thresholds"])
        return {key: report[key] for key in keys} | {"classes": classes, "lowest": lowest} | _of_training(curves)

    path = _write("comparison.html", numbers | {"curves": curves}, for_scripts, images, folder)
    draw_comparison(numbers, folder / "plots", curves)
    return path


def _write(
    template: str,
    numbers: Report,
    for_scripts: Callable[[Report], Report],
    images: Path,
    folder: Path,
    **more: str | None,
) -> Path:
    """for_scripts: what the page's scripts read of a report. more: what else the template reads."""
    if numbers.get("format") != FORMAT:
        raise ValueError(f"the report is of format {numbers.get('format')}, not {FORMAT}: make it again")
    folder.mkdir(parents=True, exist_ok=True)

    def render(report: Report) -> str:
        return TEMPLATES.get_template(template).render(report=report, data=for_scripts(report), **more)

    bare = len(render(numbers | {"images": []}).encode())
    shown = embed_pictures(numbers, images, folder, LARGEST_PAGE - bare - FOR_NOTES)
    _write_json(numbers | {"left_out": shown["left_out"]}, folder / "report.json")
    path = folder / "index.html"
    path.write_text(render(shown), encoding="utf-8")
    return path


def _write_json(numbers: Report, path: Path) -> None:
    try:
        text = json.dumps(numbers, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError("the report has a number that is not finite; missing numbers must be None") from error
    path.write_text(text + "\n", encoding="utf-8")


def _cells(numbers: Report, classes: Sequence[int]) -> list[list[Any]]:
    """The cells of the confusion matrix of these classes."""
    shown = {*classes, BACKGROUND}
    return [cell for cell in numbers["confusion"]["cells"] if cell[0] in shown and cell[1] in shown]


def _of_training(curves: dict[str, dict[str, Curve]]) -> Report:
    """What the page's scripts read of training curves."""
    return {
        "curves": {run: {name: _thinned(curve) for name, curve in x.items()} for run, x in curves.items()},
        "panels": {name: {"title": title, "log": name in LOGARITHMIC} for name, title in PANELS.items()},
    }


def _thinned(curve: Curve) -> list[tuple[int, float]]:
    """(iteration, value), at most `POINTS` of them, with the first, the last and the highest."""
    points = sorted(curve.items())
    highest = max(points, key=lambda point: point[1])
    step = -(-len(points) // (POINTS - 2))
    return sorted({*points[::step], highest, points[-1]})


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _fine(value: float | None) -> str:
    """Of scores and distances, whose second decimal is the first that counts if they are small."""
    return _number(value, 3 if value is not None and abs(value) < 0.1 else 2)


def _count(value: int) -> str:
    return f"{value:,}"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{_count(count)} {one if count == 1 else many or one + 's'}"


TEMPLATES.filters |= {"number": _number, "fine": _fine, "count": _count, "plural": _plural}
