"""Predict large images tile by tile and merge the results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from detectron2.structures import Boxes, Instances


def spread(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Cover [0, length) with the fewest equal intervals of at most `size` that share at least `overlap`.

    Raises:
        ValueError: the overlap is negative or not smaller than a tile.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"an overlap of {overlap} pixels is not valid for tiles of {size} pixels")
    count = 1 if length <= size else -(-(length - overlap) // (size - overlap))
    tile = -(-(length + (count - 1) * overlap) // count)
    starts = np.linspace(0, length - tile, count).astype(int)
    return [(int(start), int(start) + tile) for start in starts]


def predict_in_tiles(
    predict: Callable[[np.ndarray], Instances],
    image: np.ndarray,
    size: int,
    overlap: int,
    drop_duplicates: Callable[[Instances], Instances] = lambda found: found,
) -> Instances:
    """Run `predict` on overlapping tiles; keep each detection only in the tile whose core contains its centre.

    Cores divide the image in the middle of the overlaps, so that, if the overlap is wider than an object, no object is
    cut. Two tiles may place an object's centre on either side of the line between their cores and find it twice:
    `drop_duplicates` is for these.

    Args:
        predict: (h, w, 3) image -> Instances with `pred_boxes`, `scores`, `pred_classes`.
        image: (H, W, 3).
        size: longest side of a tile in pixels.
        overlap: minimum overlap of neighbouring tiles in pixels.
        drop_duplicates: applied to the detections of several tiles together.

    Returns:
        Instances of the whole image, highest score first.
    """
    height, width = image.shape[:2]
    rows, columns = spread(height, size, overlap), spread(width, size, overlap)
    found = []
    for y, core_y in zip(rows, _cores(rows), strict=True):
        for x, core_x in zip(columns, _cores(columns), strict=True):
            instances = predict(image[y[0] : y[1], x[0] : x[1]])
            boxes = instances.pred_boxes.tensor + instances.pred_boxes.tensor.new_tensor([x[0], y[0]] * 2)
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            low, high = centre.new_tensor([core_x[0], core_y[0]]), centre.new_tensor([core_x[1], core_y[1]])
            keep = ((centre >= low) & (centre < high)).all(1)
            whole = Instances((height, width), **instances.get_fields())
            whole.pred_boxes = Boxes(boxes)
            found.append(whole[keep])
    result = found[0] if len(found) == 1 else drop_duplicates(Instances.cat(found))
    return result[result.scores.argsort(descending=True)]


def _cores(intervals: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Divide the covered range in the middle of each overlap."""
    middles = [(end + start) / 2 for (_, end), (start, _) in zip(intervals[:-1], intervals[1:], strict=True)]
    return list(zip([-np.inf, *middles], [*middles, np.inf], strict=True))
