"""The matchability-aware class loss of DEIM (arXiv 2412.04234)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from dino_d2.structures import Pairs, Predictions

GAMMA = 1.5  # of the IoU in the target, and of the focal factor of the background


def matchability_loss(
    predictions: Predictions, pairs: Pairs, labels: Tensor, iou: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Binary cross-entropy with IoU^1.5 of the pair as target; weighted by p^1.5 (detached) for background.

    Arguments and results: :data:`dino_d2.modeling.losses.ClassLoss`.
    """
    where = pairs.class_logits(labels)
    logits = predictions.logits
    target = pairs.weighted(iou**GAMMA)
    matched = binary_cross_entropy_with_logits(logits[where], target.to(logits.dtype), reduction="none")
    background = logits.detach().sigmoid() ** GAMMA * -logsigmoid(-logits)
    return background.index_put(where, matched).sum(), pairs.weight
