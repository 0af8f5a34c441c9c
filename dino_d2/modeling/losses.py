"""The three losses of DETR-like detectors, without weights and without division by the number of boxes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dino_d2.geometry import cxcywh_to_xyxy, iou_and_generalized_iou
from dino_d2.structures import Pairs, Predictions

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0

# (predictions, pairs, labels, iou) -> (loss, box_weight); `focal_loss` is DINO's, others are in `family`.
#     labels: of all objects in the batch.
#     iou: (M,) of the boxes of each pair, without gradient.
#     loss: sum over all queries and classes.
#     box_weight: (M,) factor of the box losses of each pair; None: all 1.
ClassLoss = Callable[[Predictions, Pairs, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def focal_loss(predictions: Predictions, pairs: Pairs, labels: Tensor, iou: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sigmoid focal loss (arXiv 1708.02002); unmatched queries are background.

    The target of a pair is its weight, which is 1 in one-to-one matching. Arguments and results: :data:`ClassLoss`.
    """
    target = torch.zeros_like(predictions.logits)
    target[pairs.class_logits(labels)] = pairs.weighted(1)
    loss = sigmoid_focal_loss(predictions.logits, target, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    return loss, pairs.weight


def box_losses(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 loss, generalised IoU loss and detached IoU of M pairs of boxes: (M, 4) cx, cy, w, h each -> three (M,)."""
    l1 = (predicted - target).abs().sum(-1)
    iou, generalized_iou = iou_and_generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return l1, 1 - generalized_iou, iou.detach()
