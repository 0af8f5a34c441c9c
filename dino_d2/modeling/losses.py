"""The three losses of DETR-like detectors, unweighted, summed and divided by a given number of boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dino_d2.geometry import cxcywh_to_xyxy, generalized_iou
from dino_d2.structures import Pairs, Predictions

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


def class_loss(predictions: Predictions, pairs: Pairs, labels: Tensor, num_boxes: Tensor | float) -> Tensor:
    """Sigmoid focal loss over all queries and classes; unpaired queries are background.

    Args:
        labels: (M,) of the objects of the whole batch.
    """
    target = torch.zeros_like(predictions.logits)
    target[pairs.image, pairs.query, labels[pairs.target]] = 1
    loss = sigmoid_focal_loss(predictions.logits, target, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    return loss / num_boxes


def box_losses(
    predictions: Predictions, pairs: Pairs, boxes: Tensor, num_boxes: Tensor | float
) -> tuple[Tensor, Tensor]:
    """L1 and generalised IoU loss of the paired queries; `boxes` (M, 4) are the objects of the whole batch."""
    predicted, target = predictions.boxes[pairs.image, pairs.query], boxes[pairs.target]
    l1 = F.l1_loss(predicted, target, reduction="sum")
    giou = 1 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return l1 / num_boxes, giou.sum() / num_boxes
