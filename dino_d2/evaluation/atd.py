"""Average top-k distance (paper section 3.3): how far the decoder's anchors start from their objects.

The official code does not compute it; this is the paper's definition.
"""

from __future__ import annotations

from torch import Tensor


def average_top_k_distance(boxes: Tensor, anchors: Tensor, k: int) -> Tensor:
    """ATD(k): mean of the k largest of |b_i - a_i|_1.

    The largest, because objects with a distant anchor are the ones confused with others.

    Args:
        boxes: (M, 4) objects b_i of a whole dataset, cx, cy, w, h in [0, 1] of their image.
        anchors: (M, 4) a_i, initial decoder anchor of the query whose final prediction is matched to b_i; same format.
        k: at least 1. With fewer than k pairs, the mean of all.

    Returns:
        () in [0, 4], lower is better; NaN without pairs.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    distances = (boxes - anchors).abs().sum(-1)
    return distances.topk(min(k, len(distances))).values.mean()
