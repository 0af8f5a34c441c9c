"""Several detections of one object: DINO learns to make one, but not in hundreds of steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dino_d2.geometry import iou_and_generalized_iou

OWN_VOTE = 1e-12  # on top of its score's: keeps boxes without area, which overlap nothing, as they are


def vote(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Average the boxes around the same object (box voting; Gidaris and Komodakis, arXiv 1505.01749, section 5).

    Each box becomes the mean of those of its class and image that overlap it by more than `iou_threshold`, itself
    included. Their weights are squared scores; the paper's are the scores, which did worse on playing cards
    (docs/few_photos.md).

    Args:
        boxes: (B, n, 4) x1, y1, x2, y2.
        scores, classes: (B, n).

    Returns:
        (B, n, 4).
    """
    together = _of_one_object(boxes, classes, iou_threshold)
    weights = (together * scores.square()[:, None])[..., None]
    # Not a product of matrices, which autocast around the model would compute in 16 bits.
    return ((weights * boxes[:, None]).sum(2) + OWN_VOTE * boxes) / (weights.sum(2) + OWN_VOTE)


def agreed_scores(
    boxes: Tensor, scores: Tensor, classes: Tensor, of_copies: Sequence[int], iou_threshold: float
) -> Tensor:
    """Scores that tell in how many copies of an image an object was found.

    Each is the mean of two: the detection's own, and the mean over the copies of the highest of its class that overlaps
    it by more than `iou_threshold`, 0 where none does. The highest of all copies alone would be too high for a
    threshold that was found with one, and the mean alone ranks worse (docs/few_photos.md).

    Args:
        boxes: (n, 4) x1, y1, x2, y2, copy by copy, in common coordinates.
        scores, classes: (n,).
        of_copies: number of detections in each copy; n together.

    Returns:
        (n,).
    """
    together = _of_one_object(boxes[None], classes[None], iou_threshold)[0]
    by_copy = zip(together.split(of_copies, dim=1), scores.split(of_copies), strict=True)
    best = [(overlaps * found).amax(1) for overlaps, found in by_copy if len(found)]
    return (scores + sum(best) / len(of_copies)) / 2


def _of_one_object(boxes: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes (B, n, 4) of one class overlap, (B, n, n) bool."""
    overlap = iou_and_generalized_iou(boxes[:, :, None], boxes[:, None])[0]
    return (overlap > iou_threshold) & (classes[:, :, None] == classes[:, None])
