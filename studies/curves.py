"""Plot the metrics of a study against seconds of training, or steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plan import Study
from .results import Result, by_seed

MOST_COLUMNS = 4  # for one data set


def draw(study: Study, results: Sequence[Result], path: Path) -> Figure:
    """Write and return a figure: a panel per data set and metric, means of the seeds as lines, every seed as a dot.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError(f"{study.file}: no results to plot")
    panels = [(metric, data.name) for metric in study.metrics for data in study.data]
    columns = len(study.data) if len(study.data) > 1 else min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (metric, data) in zip(axes.flat, panels, strict=False):
        for number, detector in enumerate(study.detectors):
            own = [x for x in results if (x.data, x.detector) == (data, detector.name)]
            values = {moment: [*by_seed(own, metric, moment).values()] for moment in study.evaluate_at}
            means = [(moment, statistics.fmean(found)) for moment, found in values.items() if found]
            dots = [(moment, value) for moment, found in values.items() for value in found]
            if dots:
                axis.plot(*zip(*means, strict=True), f"C{number}", lw=1.5)
                axis.plot(*zip(*dots, strict=True), f"C{number}o", ms=3, alpha=0.6)
        axis.set_title(f"{data}: {metric}", loc="left", fontsize=11)
        axis.set_xlim(0, study.budget * 1.02)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(f"{study.unit.capitalize()} of training")
    handles = [
        Line2D([], [], color=f"C{number}", lw=2, label=detector.name)
        for number, detector in enumerate(study.detectors)
        if any(result.detector == detector.name for result in results)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return figure
