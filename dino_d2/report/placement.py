"""Whether boxes lie systematically beside the annotated ones, or are too large or too small."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .dataset import Found, Truth
from .errors import Judgement

FEWEST = 10  # boxes; the interval of fewer says nothing
NORMAL = 1.96  # standard deviations that hold 95 %


def placement(truth: Truth, found: Found, judgement: Judgement) -> dict[str, Any] | None:
    """Medians over the sure boxes that are right or badly placed, compared with their objects.

    The 95 % interval of a median goes by ranks (Conover, Practical Nonparametric Statistics, section 3.2), as if the
    boxes were independent.

    Returns:
        {"boxes": how many, "x", "y", "width", "height"}, the last four {"value", "low", "high"} in percent of the
        object's side: the centre is to the right, further down, the box wider and higher if positive. None for fewer
        than `FEWEST` boxes.
    """
    chosen = judgement.sure & (judgement.is_kind("right") | judgement.is_kind("badly_placed"))
    boxes, objects = found.xywh[chosen], truth.xywh[judgement.object[chosen]]
    has_area = (objects[:, 2:] > 0).all(1)
    boxes, objects = boxes[has_area], objects[has_area]
    if len(boxes) < FEWEST:
        return None
    shift = (boxes[:, :2] + boxes[:, 2:] / 2 - objects[:, :2] - objects[:, 2:] / 2) / objects[:, 2:]
    growth = boxes[:, 2:] / objects[:, 2:] - 1
    values = np.hstack([shift, growth]).T * 100
    return {"boxes": len(boxes)} | dict(zip(("x", "y", "width", "height"), map(_median, values), strict=True))


def _median(values: np.ndarray) -> dict[str, float]:
    ordered, n = np.sort(values), len(values)
    reach = NORMAL * math.sqrt(n) / 2
    low, high = max(math.floor(n / 2 - reach), 0), min(math.ceil(n / 2 + reach), n - 1)
    return {"value": float(np.median(ordered)), "low": float(ordered[low]), "high": float(ordered[high])}
