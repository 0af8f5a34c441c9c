"""Which objects are found: by size, aspect ratio, crowding and distance from the border."""

from __future__ import annotations

from typing import Any

import numpy as np

from .dataset import Found, Truth
from .intervals import PERCENT, interval, ratio
from .matches import AREAS, Pairs, overlapping

# (name, upper limit); a value on the limit is in the next bin.
SIZES = (
    ("small (under 32 px)", AREAS["small"][1]),
    ("medium (32 to 96 px)", AREAS["medium"][1]),
    ("large (over 96 px)", np.inf),
)
SHAPES = (  # width / height
    ("tall (over 2:1)", 1 / 2),
    ("upright", 4 / 5),
    ("square (within 5:4)", 5 / 4),
    ("lying", 2),
    ("wide (over 2:1)", np.inf),
)
CROWDING = (  # largest IoU with another object
    ("free (IoU with others under 0.1)", 0.1),
    ("overlapped (0.1 to 0.3)", 0.3),
    ("crowded (over 0.3)", np.inf),
)
BORDER = (("at the border (under 2 px)", 2), ("near it (2 to 16 px)", 16), ("inside (over 16 px)", np.inf))
Bins = tuple[tuple[str, float], ...]


def neighbours(truth: Truth) -> Pairs:
    """Pairs of objects that overlap, without crowds; each pair is there twice."""
    as_found = Found(truth.image, truth.label, truth.xywh, np.zeros(len(truth.image)), len(truth.image))
    pairs = overlapping(truth, as_found)
    return pairs[(pairs.found != pairs.object) & ~truth.crowd[pairs.found] & ~truth.crowd[pairs.object]]


def slices(
    truth: Truth, found: np.ndarray, near: Pairs, ap_of_sizes: list[float | None], weights: np.ndarray | None
) -> dict[str, list[dict[str, Any]]]:
    """Recall in percent, of the objects in each bin of size, aspect ratio, crowding and distance from the border.

    Args:
        found: (m,) bool, of each object.
        near: from :func:`neighbours`.
        ap_of_sizes: AP of small, medium and large objects; None where there are none.
        weights: for intervals; see :func:`dino_d2.report.intervals.draw_samples`.
    """
    width, height = truth.xywh[:, 2], truth.xywh[:, 3]
    crowding = np.zeros(len(truth.image))
    np.maximum.at(crowding, near.found, near.iou)
    sizes = truth.sizes[truth.image]
    border = np.concatenate([truth.xywh[:, :2], sizes - truth.xywh[:, :2] - truth.xywh[:, 2:]], axis=1).min(1)
    rows = {
        "size": _recall(truth, found, truth.area, SIZES, weights),
        "aspect ratio": _recall(truth, found, width / np.maximum(height, 1e-9), SHAPES, weights),
        "crowding": _recall(truth, found, crowding, CROWDING, weights),
        "border": _recall(truth, found, border, BORDER, weights),
    }
    for row, ap in zip(rows["size"], ap_of_sizes, strict=True):
        row["AP"] = ap
    return rows


def _recall(
    truth: Truth, found: np.ndarray, values: np.ndarray, bins: Bins, weights: np.ndarray | None
) -> list[dict[str, Any]]:
    places = np.searchsorted([limit for _, limit in bins], values, side="right")
    rows = []
    for place, (name, _) in enumerate(bins):
        here = (places == place) & ~truth.crowd
        right = here & found
        objects, number = int(here.sum()), int(right.sum())
        recall, low, high = 100 * number / objects if objects else None, None, None
        if weights is not None and objects:
            counts = [np.bincount(truth.image[x], minlength=len(truth.ids)) for x in (right, here)]
            low, high = interval(recall, 100 * ratio(*counts, weights), PERCENT)
        rows.append(
            {"name": name, "objects": objects, "found": number, "recall": recall, "AP": None, "low": low, "high": high}
        )
    return rows
