"""Plot AP and AP50 of a study against seconds of training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plan import Study
from .results import SHOWN, Result


def draw(study: Study, results: Sequence[Result], path: Path) -> None:
    """A panel per data set and metric: means of the seeds as lines, every seed as a dot.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError(f"{study.file}: no results to plot")
    figure = Figure(figsize=(4.2 * len(study.data) + 0.4, 2.9 * len(SHOWN) + 0.6), layout="constrained")
    axes = figure.subplots(len(SHOWN), len(study.data), squeeze=False, sharex=True, sharey="row")
    for row, metric in zip(axes, SHOWN, strict=True):
        for axis, data in zip(row, study.data, strict=True):
            for number, detector in enumerate(study.detectors):
                own = [x for x in results if (x.data, x.detector) == (data.name, detector.name)]
                values = {s: [x.at(s)[metric] for x in own if x.at(s)] for s in study.evaluate_at}
                means = [(seconds, statistics.fmean(found)) for seconds, found in values.items() if found]
                dots = [(seconds, value) for seconds, found in values.items() for value in found]
                if dots:
                    axis.plot(*zip(*means, strict=True), f"C{number}", lw=1.5)
                    axis.plot(*zip(*dots, strict=True), f"C{number}o", ms=3, alpha=0.6)
            axis.set_title(f"{data.name}: {metric}", loc="left", fontsize=11)
            axis.set_xlim(0, study.budget * 1.02)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("Seconds of training")
    handles = [Line2D([], [], color=f"C{number}", lw=2, label=x.name) for number, x in enumerate(study.detectors)]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
