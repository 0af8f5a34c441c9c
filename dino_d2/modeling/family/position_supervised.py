"""The position-supervised class loss and the position-modulated matching cost of Stable-DINO (arXiv 2304.04742)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from dino_d2.modeling.losses import FOCAL_ALPHA, FOCAL_GAMMA
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import Pairs, Predictions

IOU_EXPONENT = 2.0  # in the target of the loss
COST_EXPONENT = 0.5  # of the overlap in the cost
EPS = 1e-8


def position_supervised_loss(
    predictions: Predictions, pairs: Pairs, labels: Tensor, iou: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Focal loss with IoU^2 of the pair as target, rescaled so that the best pair of each image has target 1.

    Arguments and results: :data:`dino_d2.modeling.losses.ClassLoss`.
    """
    where = pairs.class_logits(labels)
    target = iou**IOU_EXPONENT
    best = target.new_zeros(len(predictions.logits)).scatter_reduce(0, pairs.image, target, "amax")
    target = pairs.weighted(target * _rescale(best)[pairs.image]).to(predictions.logits.dtype)

    probability = predictions.logits.sigmoid()
    log_of_rest = ((-predictions.logits).sigmoid() + EPS).log()
    background = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -log_of_rest
    cross_entropy = -target * logsigmoid(predictions.logits[where]) - (1 - target) * log_of_rest[where]
    matched = FOCAL_ALPHA * (target - probability[where]) ** FOCAL_GAMMA * cross_entropy
    return background.index_put(where, matched).sum(), pairs.weight


class PositionModulatedMatcher(HungarianMatcher):
    """Multiplies each probability in the class cost by v^0.5, with v = (GIoU + 1) / 2 of the pair, rescaled so that
    the best pair of the image has v = 1.

    The official code stores v per query and class for the whole batch, so objects of the same class overwrite each
    other. Here v is per pair, and the cost of an image does not depend on the rest of its batch.
    """

    def class_cost(self, probability: Tensor, overlap: Tensor) -> Tensor:
        value = (overlap.nan_to_num(-1) + 1) / 2  # a NaN box must not affect the other costs
        best = value.max() if value.numel() else value.new_ones(())
        return super().class_cost(probability * (value * _rescale(best)) ** COST_EXPONENT, overlap)


def _rescale(best: Tensor) -> Tensor:
    """Factor, at least 1, that rescales the best value of an image to 1."""
    return (1 / (best + EPS)).clamp(min=1)
