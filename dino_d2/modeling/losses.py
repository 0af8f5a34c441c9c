"""The three losses of DETR-like detectors, without weights and without division by the number of boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dino_d2.geometry import cxcywh_to_xyxy, generalized_iou
from dino_d2.structures import Pairs, Predictions

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def class_loss(predictions: Predictions, pairs: Pairs, labels: Tensor) -> Tensor:
    """Sum of the sigmoid focal loss over all queries and classes; unmatched queries are background.

    Args:
        labels: (M,) labels of all objects in the batch.
    """
    target = torch.zeros_like(predictions.logits)
    target[pairs.image, pairs.query, labels[pairs.target]] = 1
    return sigmoid_focal_loss(predictions.logits, target, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")


def box_losses(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and generalised IoU loss of each of M pairs of boxes: (M, 4) cx, cy, w, h each -> (M,), (M,)."""
    l1 = (predicted - target).abs().sum(-1)
    giou = 1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return l1, giou
