"""Plot the curves of training runs from detectron2's metrics.json."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dino_d2.engine.writers import loss_group
from dino_d2.fonts import plain_text

Curve = dict[int, float]  # iteration -> value
PANELS = {  # curve -> title
    "total_loss": "Total loss",
    "class": "Class loss (all layers)",
    "box": "Box loss, L1 (all layers)",
    "giou": "Box loss, GIoU (all layers)",
    "encoder": "Losses of the proposals",
    "denoising": "Denoising losses",
    "bbox/AP": "AP",
    "bbox/AP50": "AP50",
    "lr_rest": "Learning rate",
    "lr_backbone": "Learning rate, backbone",
    "grad_norm": "Gradient norm, before clipping",
    "images_per_second": "Images per second",
}
LOGARITHMIC = {"lr_rest", "lr_backbone"}


def read_curves(run: Path, dataset: str = "") -> dict[str, Curve]:
    """Read the curves of `PANELS` that a run recorded, with losses summed by group.

    Args:
        run: its OUTPUT_DIR, or the metrics.json there.
        dataset: whose AP is meant if there are several, which then stand under their names.

    If a resumed run recorded an iteration twice, the later values count.

    Raises:
        ValueError: metrics.json does not exist, or has nothing to plot; the message names the path.
    """
    file = run / "metrics.json" if run.is_dir() else run
    if not file.is_file():
        raise ValueError(f"{run}: metrics.json not found; RUN must be the OUTPUT_DIR of a training run")
    curves: dict[str, Curve] = defaultdict(dict)
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            scalars = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from error
        iteration = scalars.get("iteration")
        values: dict[str, float] = defaultdict(float)
        for name, value in scalars.items():
            curve = loss_group(name) or name.removeprefix(f"{dataset}/")
            if curve in PANELS:
                values[curve] += value
        for curve, value in values.items():
            if math.isfinite(value):
                curves[curve][iteration] = value
    if not curves:
        raise ValueError(f"{file} has nothing to plot")
    return dict(curves)


@plain_text()
def draw(runs: dict[str, dict[str, Curve]], path: Path) -> None:
    """Plot the curves of each run, by its name, to an image file."""
    panels = [panel for panel in PANELS if any(panel in curves for curves in runs.values())]
    last = max(max(curve) for curves in runs.values() for curve in curves.values())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, curves in enumerate(runs.values()):
            points = sorted(curves.get(panel, {}).items())
            marker = "o" if len(points) <= 20 else None
            axis.plot(*zip(*points, strict=True) if points else ([], []), f"C{number}", lw=1.5, marker=marker, ms=3)
        axis.set_title(PANELS[panel], loc="left", fontsize=11)
        axis.set_xlim(0, max(last, 1) * 1.02)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if panel in LOGARITHMIC:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for column in range(columns):
        bottom = [axis for axis in axes[:, column] if axis.get_visible()][-1]
        bottom.set_xlabel("Iteration")
    handles = [Line2D([], [], color=f"C{number}", lw=2, label=name) for number, name in enumerate(runs)]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(4, len(runs))), frameon=False)
    figure.savefig(path, dpi=120)
