"""Several detections of one object: DINO learns to make one, but not in hundreds of steps."""

from __future__ import annotations

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
    overlap = iou_and_generalized_iou(boxes[:, :, None], boxes[:, None])[0]
    together = (overlap > iou_threshold) & (classes[:, :, None] == classes[:, None])
    weights = (together * scores.square()[:, None])[..., None]
    # Not a product of matrices, which autocast around the model would compute in 16 bits.
    return ((weights * boxes[:, None]).sum(2) + OWN_VOTE * boxes) / (weights.sum(2) + OWN_VOTE)
