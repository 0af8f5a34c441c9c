"""The three losses of DETR-like detectors, unweighted and not yet divided by a number of boxes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dino_d2.geometry import cxcywh_to_xyxy, iou_and_generalized_iou
from dino_d2.structures import Pairs, Predictions

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0

# What the criterion takes; :func:`focal_loss` is the published one, others are in `family`.
# Args:
#     predictions, M pairs, labels of the objects of the whole batch, IoU (M,) of each pair's boxes without gradient.
# Returns:
#     the sum over all queries and classes; the weight (M,) of the box losses of each pair, None: 1.
ClassLoss = Callable[[Predictions, Pairs, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def focal_loss(predictions: Predictions, pairs: Pairs, labels: Tensor, iou: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sigmoid focal loss (arXiv 1708.02002): the target of a pair's class is 1, or the pair's weight where it has one;
    all other classes are background, as are queries without a pair. See :data:`ClassLoss`."""
    target = torch.zeros_like(predictions.logits)
    target[pairs.class_logits(labels)] = pairs.weighted(1)
    loss = sigmoid_focal_loss(predictions.logits, target, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    return loss, pairs.weight


def box_losses(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 and generalised IoU loss of each of M pairs of boxes, and their IoU without gradient.

    Args:
        predicted, target: (M, 4) cx, cy, w, h.

    Returns:
        (M,), (M,), (M,).
    """
    l1 = (predicted - target).abs().sum(-1)
    iou, generalized_iou = iou_and_generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return l1, 1 - generalized_iou, iou.detach()
