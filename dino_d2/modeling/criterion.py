"""Compute the weighted losses from predictions and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from dino_d2.structures import DenoisingQueries, Pairs, Predictions, Targets

from .losses import ClassLoss, box_losses, focal_loss
from .matcher import HungarianMatcher


@dataclass
class LossWeights:
    """Loss weights, the same for every layer; the objective is the sum of the weighted losses.

    denoising_classification: class loss weight of the denoising queries; None: `classification`.
    """

    classification: float
    l1: float
    giou: float
    denoising_classification: float | None = None

    def __post_init__(self) -> None:
        if self.denoising_classification is None:
            self.denoising_classification = self.classification


class SetCriterion:
    """Losses of the proposals and of every decoder layer's matching and denoising queries.

    Names as in the official code: `loss_ce`, `loss_bbox`, `loss_giou` for the last layer; suffix `_0`, `_1`, … for
    earlier layers, `_dn` (`_dn_0`, …) for denoising queries, `_interm` for the proposals.
    """

    def __init__(self, matcher: HungarianMatcher, weights: LossWeights, class_loss: ClassLoss = focal_loss):
        self.matcher = matcher
        self.weights = weights
        self.class_loss = class_loss
        self.count_boxes = boxes_per_process  # by which the losses are divided

    def __call__(
        self,
        layers: Sequence[Predictions],
        proposals: Predictions | None,
        denoising: DenoisingQueries,
        targets: Sequence[Targets],
    ) -> dict[str, Tensor]:
        """
        Args:
            layers: predictions of each decoder layer, denoising queries before matching queries.
            proposals: predictions of the encoder; None for learned queries.
            denoising: the denoising queries and their matches.
            targets: one per image.

        Returns:
            the weighted losses by name.
        """
        labels = torch.cat([t.labels for t in targets])
        boxes = torch.cat([t.boxes for t in targets])
        parts = self._parts(layers, proposals, denoising, targets, self.count_boxes(len(labels), boxes))

        # All layers at once: many small operations would be slower.
        box_parts = box_losses(
            torch.cat([part.predictions.boxes[part.pairs.image, part.pairs.query] for part in parts]),
            torch.cat([boxes[part.pairs.target] for part in parts]),
        )
        sizes = [len(part.pairs.query) for part in parts]
        losses = {}
        for part, l1, giou, iou in zip(parts, *(x.split(sizes) for x in box_parts), strict=True):
            classification, box_weight = self.class_loss(part.predictions, part.pairs, labels, iou)
            losses[f"loss_ce{part.suffix}"] = classification * (part.class_weight / part.count)
            losses[f"loss_bbox{part.suffix}"] = _sum(l1, box_weight) * (self.weights.l1 / part.count)
            losses[f"loss_giou{part.suffix}"] = _sum(giou, box_weight) * (self.weights.giou / part.count)
        return losses

    def _parts(
        self,
        layers: Sequence[Predictions],
        proposals: Predictions | None,
        denoising: DenoisingQueries,
        targets: Sequence[Targets],
        num_boxes: Tensor,
    ) -> list[_Part]:
        denoised, matched = zip(*(layer.split(len(denoising)) for layer in layers), strict=True)
        suffixes = [*(f"_{i}" for i in range(len(layers) - 1)), ""]
        proposed = [] if proposals is None else [proposals]
        pairs = self.matcher([*proposed, *matched], targets)  # in the order of the network
        of_proposals, of_layers = pairs[: len(proposed)], pairs[len(proposed) :]

        names = [*suffixes, "_interm"][: len(pairs)]
        to_match = zip(names, [*matched, *proposed], [*of_layers, *of_proposals], strict=True)
        parts = [_Part(*item, self.weights.classification, num_boxes) for item in to_match]
        if denoising.groups:
            how = (denoising.pairs, self.weights.denoising_classification, num_boxes * denoising.groups)
            parts += [_Part(f"_dn{suffix}", layer, *how) for suffix, layer in zip(suffixes, denoised, strict=True)]
        return parts


@dataclass
class _Part:
    """Predictions with their own three losses. suffix: of the loss names; count: the losses are divided by it."""

    suffix: str
    predictions: Predictions
    pairs: Pairs
    class_weight: float
    count: Tensor


def _sum(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses.sum() if weight is None else (losses * weight).sum()


def boxes_of_this_process(count: int, like: Tensor) -> Tensor:
    """Number of boxes, at least 1, without asking the other processes."""
    return like.new_tensor(max(count, 1))


def boxes_per_process(count: int, like: Tensor) -> Tensor:
    """Number of boxes averaged over processes, at least 1."""
    total = like.new_full((), count)
    if comm.get_world_size() > 1:
        dist.all_reduce(total)
    return (total / comm.get_world_size()).clamp(min=1)
