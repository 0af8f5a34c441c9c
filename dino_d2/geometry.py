"""Box operations: formats, inverse sigmoid, generalised IoU."""

from __future__ import annotations

import torch
from torch import Tensor

# Both values are from the official code.
LOGIT_EPS = 1e-3  # limits how far one decoder layer can move a box
IOU_EPS = 1e-6  # keeps results finite for boxes without area


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> (..., 4) x1, y1, x2, y2 in the same unit."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) x1, y1, x2, y2 -> (..., 4) centre x, centre y, width, height in the same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def inverse_sigmoid(x: Tensor, eps: float = LOGIT_EPS) -> Tensor:
    """Logit of `x`, clamped to [0, 1]; both tails are limited by `eps`."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes x1, y1, x2, y2; leading dimensions broadcast.

    `generalized_iou(a[:, None], b[None])` is the pairwise matrix. Unlike the versions in detectron2 and fvcore it does
    not assert the order of the corners and does not synchronise with the device.

    Args:
        a, b: (..., 4).

    Returns:
        (...) in [-1, 1].
    """
    return iou_and_generalized_iou(a, b)[1]


def iou_and_generalized_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU, in [0, 1], and generalised IoU; arguments as for :func:`generalized_iou`."""
    low_a, high_a, low_b, high_b = a[..., :2], a[..., 2:], b[..., :2], b[..., 2:]
    intersection = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = (high_a - low_a).prod(-1) + (high_b - low_b).prod(-1) - intersection
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0).prod(-1)
    iou = intersection / (union + IOU_EPS)
    return iou, iou - (hull - union) / (hull + IOU_EPS)
