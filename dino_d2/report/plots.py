"""The plots of a report as PNG, for papers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dino_d2.fonts import plain_text

from . import curves as training_curves
from .errors import BACKGROUND

MOST_CLASSES = 40  # in the confusion matrix and in plots of classes
ERRORS = ("classification", "localization", "both", "duplicate", "background", "missed")  # of TIDE
TRUTH, FOUND, GREY = "#0072B2", "#D55E00", "#777777"  # told apart with any kind of colour vision
DPI = 150
PLOTS = (  # of a report or a comparison
    *("ap_by_class", "precision_recall", "f1", "errors", "confusion", "calibration", "layers", "slices"),
    *("corruptions", "sizes", "curves", "differences", "differences_by_class"),
)

Report = dict[str, Any]


def draw_report(
    numbers: Report,
    folder: Path,
    curves: dict[str, dict[str, training_curves.Curve]] | None = None,
    robustness: Report | None = None,
) -> None:
    """Write every plot that there are numbers for to `folder`; those of an earlier report or comparison are deleted.

    Arguments are those of :func:`dino_d2.report.page.write_page`.
    """
    _clear(folder)
    measured = [x for x in numbers["classes"] if x["AP"] is not None]
    curved = [x for x in measured if x["pr"]]
    layers, tested = layer_ap(numbers), robustness or {}
    with plain_text():
        _save(folder / "ap_by_class.png", _ap_by_class(measured) if measured else None)
        _save(folder / "precision_recall.png", _precision_recall(curved) if curved else None)
        _save(folder / "f1.png", _f1(numbers) if numbers["f1"] else None)
        _save(folder / "errors.png", _errors(numbers["tide"]))
        _save(folder / "confusion.png", _confusion(numbers))
        _save(folder / "calibration.png", _calibration(numbers["calibration"]))
        _save(folder / "layers.png", _line(layers, "Decoder layer", "AP") if layers else None)
        _save(folder / "slices.png", _slices(numbers["slices"]) if numbers["slices"] else None)
        _save(folder / "corruptions.png", _corruptions(tested["corruptions"]) if tested.get("corruptions") else None)
        sizes = size_ap(tested)
        _save(folder / "sizes.png", _line(sizes, "Scale of the images", "AP") if sizes else None)
    if curves:
        training_curves.draw(curves, folder / "curves.png")


def draw_comparison(
    numbers: Report, folder: Path, curves: dict[str, dict[str, training_curves.Curve]] | None = None
) -> None:
    """Write the differences by metric and by class, and the training curves, to `folder`, as :func:`draw_report`."""
    _clear(folder)
    metrics = [{"name": name} | values for name, values in numbers["metrics"].items()]
    largest = sorted(numbers["classes"], key=lambda x: -abs(x["difference"] or 0))[:MOST_CLASSES]
    with plain_text():
        for name, rows in (("differences", metrics), ("differences_by_class", largest)):
            rows = [row for row in rows if row["difference"] is not None]
            _save(folder / f"{name}.png", _differences(rows, numbers["names"]) if rows else None)
    if curves:
        training_curves.draw(curves, folder / "curves.png")


def layer_ap(numbers: Report) -> list[tuple[int, float]]:
    """(layer, AP) of every decoder layer, counted from 1; empty if it was not measured."""
    queries = numbers["queries"] or {}
    found = {name.removeprefix("AP_layer"): ap for name, ap in queries.items() if name.startswith("AP_layer")}
    return sorted((int(layer), ap) for layer, ap in found.items() if ap is not None)


def size_ap(robustness: Report) -> list[tuple[float, float]]:
    """(scale of the images, AP), ascending; empty if it was not measured."""
    return sorted((float(scale), ap) for scale, ap in robustness.get("sizes", {}).items() if ap is not None)


def most_confused(numbers: Report) -> list[int]:
    """Classes of the confusion matrix, ascending: at most `MOST_CLASSES`, those that were most often taken for another
    class, or another for them."""
    count = len(numbers["classes"])
    confused = Counter(dict.fromkeys(range(count), 0))
    for truth, found, objects, _ in numbers["confusion"]["cells"]:
        if truth != found and BACKGROUND not in (truth, found):
            confused[truth] += objects
            confused[found] += objects
    return sorted(index for index, _ in confused.most_common(MOST_CLASSES))


def row_totals(numbers: Report) -> Counter[int]:
    """Objects of each class in the confusion matrix, and under `BACKGROUND` the boxes found where there is none."""
    totals: Counter[int] = Counter()
    for truth, _, objects, _ in numbers["confusion"]["cells"]:
        totals[truth] += objects
    return totals


def confusion_shares(numbers: Report, classes: Sequence[int]) -> np.ndarray:
    """(n + 1, n + 1) percent of the objects of a row, those found as other classes included; `BACKGROUND` is last."""
    places = {index: place for place, index in enumerate([*classes, BACKGROUND])}
    totals = row_totals(numbers)
    shares = np.zeros((len(places), len(places)))
    for truth, found, objects, _ in numbers["confusion"]["cells"]:
        if truth in places and found in places:
            shares[places[truth], places[found]] = 100 * objects / max(totals[truth], 1)
    return shares


def _clear(folder: Path) -> None:
    """Make the folder, or delete the plots in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        (folder / f"{name}.png").unlink(missing_ok=True)


def _save(path: Path, figure: Figure | None) -> None:
    if figure is not None:
        figure.savefig(path, dpi=DPI)


def _axes(width: float = 4.6, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure of so many inches with one plot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _calm(axes)
    return figure, axes


def _calm(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def _ap_by_class(classes: Sequence[Report]) -> Figure:
    """The classes with the highest and with the lowest AP, if there are too many."""
    ranking = sorted(classes, key=lambda x: -x["AP"])
    if len(ranking) > MOST_CLASSES:
        ranking = ranking[: MOST_CLASSES // 2] + ranking[-MOST_CLASSES // 2 :]
    figure, axes = _axes(5.5, 1 + 0.22 * len(ranking))
    values = np.array([x["AP"] for x in ranking])
    axes.barh(range(len(ranking)), values, color=TRUTH)
    for row, x in enumerate(ranking):
        if x["AP_low"] is not None:
            axes.plot([x["AP_low"], x["AP_high"]], [row, row], color="black", lw=1)
    _label_rows(axes, [x["name"] for x in ranking])
    axes.set_xlabel("AP, with its 95 % interval" if ranking[0]["AP_low"] is not None else "AP")
    return figure


def _precision_recall(classes: Sequence[Report]) -> Figure:
    """Every class in grey and their mean."""
    figure, axes = _axes()
    recalls = np.linspace(0, 100, len(classes[0]["pr"]))
    for x in classes:
        axes.plot(recalls, x["pr"], color=GREY, alpha=0.35, lw=0.8)
    axes.plot(recalls, np.mean([x["pr"] for x in classes], axis=0), color=TRUTH, lw=2, label="mean over the classes")
    axes.set(xlabel="Recall", ylabel="Precision, IoU 0.5", xlim=(0, 100), ylim=(0, 102))
    axes.legend(frameon=False)
    return figure


def _f1(numbers: Report) -> Figure:
    figure, axes = _axes()
    axes.plot(*numbers["f1"], color=TRUTH, lw=2)
    score = numbers["threshold"]["score"]
    axes.axvline(score, color=FOUND, lw=1, ls="--")
    axes.annotate(f" {score:.2f}", (score, 0), color=FOUND, va="bottom")
    axes.set(xlabel="Score threshold", ylabel="F1, all classes, IoU 0.5", xlim=(0, 1), ylim=(0, None))
    return figure


def _errors(tide: Report) -> Figure:
    figure, axes = _axes(4.6, 2.6)
    axes.barh(range(len(ERRORS)), [tide[name] or 0 for name in ERRORS], color=TRUTH)
    _label_rows(axes, list(ERRORS))
    axes.set_xlabel("AP50 points lost")
    return figure


def _confusion(numbers: Report) -> Figure:
    """Rows: share of the objects of a class, in percent."""
    shown = most_confused(numbers)
    shares = confusion_shares(numbers, shown)
    side = 3 + 0.2 * len(shares)
    figure, axes = _axes(side + 0.8, side)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [*(numbers["classes"][index]["name"] for index in shown), "background"]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    axes.set(xlabel="Found", ylabel="Truth")
    figure.colorbar(drawn, label="Percent of the row", shrink=0.6)
    return figure


def _calibration(calibration: Report) -> Figure:
    bins = [x for x in calibration["bins"] if x["count"]]
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
    axes.plot([x["score"] for x in bins], [x["precision"] for x in bins], color=TRUTH, lw=2, marker="o", ms=4)
    axes.set(xlabel="Mean score", ylabel="Precision, IoU 0.5", xlim=(0, 1), ylim=(0, 1))
    return figure


def _slices(slices: Report) -> Figure:
    groups = {name: [x for x in group if x["recall"] is not None] for name, group in slices.items()}
    groups = {name: group for name, group in groups.items() if group}
    rows = sum(map(len, groups.values()))
    figure = Figure(figsize=(5.5, 1 + 0.35 * rows + 0.4 * len(groups)), layout="constrained")
    heights = [len(group) for group in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0] if groups else []
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        _calm(axes)
        axes.barh(range(len(group)), [x["recall"] for x in group], color=TRUTH)
        for row, x in enumerate(group):
            if x["low"] is not None:
                axes.plot([x["low"], x["high"]], [row, row], color="black", lw=1)
        _label_rows(axes, [f"{x['name']} ({x['objects']})" for x in group])
        axes.set_title(name, loc="left", fontsize=10)
    if groups:
        panels[-1].set(xlabel="Recall in percent", xlim=(0, 100))
    return figure


def _corruptions(corruptions: dict[str, list[float | None]]) -> Figure:
    figure, axes = _axes(5.5, 1.2 + 0.26 * len(corruptions))
    values = np.array([[np.nan if ap is None else ap for ap in row] for row in corruptions.values()])
    drawn = axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    axes.set_yticks(range(len(corruptions)), [name.replace("_", " ") for name in corruptions])
    axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
    axes.grid(False)
    axes.set_xlabel("Strength")
    figure.colorbar(drawn, label="AP")
    return figure


def _line(points: Sequence[tuple[float, float]], x: str, y: str) -> Figure:
    figure, axes = _axes()
    if all(isinstance(place, int) for place, _ in points):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(*zip(*points, strict=True), color=TRUTH, lw=2, marker="o", ms=4)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    return figure


def _differences(rows: Sequence[Report], names: Sequence[str]) -> Figure:
    """Differences with their intervals; grey are those that are not significant."""
    figure, axes = _axes(5.5, 1.2 + 0.24 * len(rows))
    axes.axvline(0, color="black", lw=1)
    for place, row in enumerate(rows):
        colour = TRUTH if row["significant"] else GREY
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=colour, lw=1.5)
        axes.plot(row["difference"], place, marker="o", ms=5, color=colour)
    _label_rows(axes, [row["name"] for row in rows])
    axes.set_xlabel(f"{names[1]} − {names[0]}; grey: not significant")
    return figure
