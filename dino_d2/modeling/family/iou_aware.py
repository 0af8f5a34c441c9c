"""The IoU-aware class loss of Align-DETR (arXiv 2304.07527), also the default of LW-DETR and RF-DETR."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from dino_d2.structures import Pairs, Predictions

CLASS_EXPONENT = 0.25
IOU_EXPONENT = 0.75
LEAST_TARGET = 0.01
GAMMA = 2  # of the focal factor of the background


@torch.no_grad()
def alignment(logits: Tensor, iou: Tensor) -> Tensor:
    """Quality of each pair, max(0.01, p^0.25 IoU^0.75): logits (M,) of the target classes and IoU (M,) -> (M,)."""
    return (logits.sigmoid() ** CLASS_EXPONENT * iou**IOU_EXPONENT).clamp(min=LEAST_TARGET)


def iou_aware_loss(predictions: Predictions, pairs: Pairs, labels: Tensor, iou: Tensor) -> tuple[Tensor, Tensor | None]:
    """Binary cross-entropy with the alignment of the pair as target; p^2-weighted for background.

    Arguments and results: :data:`dino_d2.modeling.losses.ClassLoss`.
    """
    where = pairs.class_logits(labels)
    logits = predictions.logits
    target = pairs.weighted(alignment(logits[where], iou))
    matched = binary_cross_entropy_with_logits(logits[where], target.to(logits.dtype), reduction="none")
    background = logits.sigmoid() ** GAMMA * -logsigmoid(-logits)
    return background.index_put(where, matched).sum(), pairs.weight
