"""Objects of a record in detectron2's format: checked, and their boxes as one array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

MODES = [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS]  # in pixels


def check_annotations(record: dict[str, Any]) -> None:
    """Reject annotations that would be learned wrongly or fail with an unclear error.

    Raises:
        ValueError: names the image, the annotation and the value.
    """
    for number, annotation in enumerate(record["annotations"], start=1):
        box, category = annotation.get("bbox"), annotation.get("category_id")
        where = f"{record['file_name']}, annotation {number}"
        is_list = isinstance(box, list | tuple | np.ndarray) and len(box) == 4
        if not is_list or not all(isinstance(side, Real) and math.isfinite(side) for side in box):
            raise ValueError(f'{where}: "bbox" is {box!r}; it must be a list of four numbers')
        if annotation.get("bbox_mode") not in MODES:
            raise ValueError(f'{where}: "bbox_mode" is {annotation.get("bbox_mode")!r}; it must be one of {MODES}')
        if not isinstance(category, Integral):
            raise ValueError(f'{where}: "category_id" is {category!r}; it must be an integer')


def boxes_of(annotations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Boxes as x1, y1, x2, y2 in pixels, (n, 4) float64, of annotations that `check_annotations` accepts."""
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
    modes = np.array([annotation["bbox_mode"] for annotation in annotations])
    for mode in {*modes.tolist()} - {BoxMode.XYXY_ABS}:
        of_mode = modes == mode
        single = boxes[of_mode].astype(np.float32)  # as detectron2 rounds them
        boxes[of_mode] = BoxMode.convert(single, BoxMode(mode), BoxMode.XYXY_ABS)
    return boxes
