"""What annotations in COCO format need for an evaluation."""

from __future__ import annotations

import math
from typing import Any

Entry = dict[str, Any]


def is_box(value: object) -> bool:
    """Whether it is four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(_is_finite_number, value))


def can_be_evaluated(annotation: Entry) -> bool:
    """Whether it has the numbers that pycocotools needs beside the box."""
    return all(_is_finite_number(annotation.get(key)) for key in ("area", "iscrowd"))


def completed(annotation: Entry) -> Entry:
    """The annotation with the numbers that pycocotools needs: by default the area of the box, and no crowd."""
    box = annotation.get("bbox")
    needed = {"area": box[2] * box[3] if is_box(box) else 0, "iscrowd": 0}
    missing = {key: value for key, value in needed.items() if not _is_finite_number(annotation.get(key))}
    return annotation | missing if missing else annotation


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
