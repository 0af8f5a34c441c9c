"""Compute the weighted losses from predictions and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from dino_d2.structures import DenoisingQueries, Predictions, Targets

from .losses import box_losses, class_loss
from .matcher import HungarianMatcher


@dataclass
class LossWeights:
    """Loss weights, the same for every layer; the objective is the sum of the weighted losses."""

    classification: float
    l1: float
    giou: float


class SetCriterion:
    """Losses of the proposals and of every decoder layer's matching and denoising queries.

    Names as in the official code: `loss_ce`, `loss_bbox`, `loss_giou` for the last layer; suffix `_0`, `_1`, … for
    earlier layers, `_dn` (`_dn_0`, …) for denoising queries, `_interm` for the proposals.
    """

    def __init__(self, matcher: HungarianMatcher, weights: LossWeights):
        self.matcher = matcher
        self.weights = weights

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
        denoised, matched = zip(*(layer.split(len(denoising)) for layer in layers), strict=True)
        suffixes = [*(f"_{i}" for i in range(len(layers) - 1)), ""]
        to_match = dict(zip(suffixes, matched, strict=True))
        if proposals is not None:
            to_match["_interm"] = proposals

        labels = torch.cat([t.labels for t in targets])
        boxes = torch.cat([t.boxes for t in targets])
        num_boxes = boxes_per_process(len(labels), boxes)
        pairs = self.matcher(list(to_match.values()), targets)
        work = [(*item, found, num_boxes) for item, found in zip(to_match.items(), pairs, strict=True)]
        if denoising.groups:
            known = (denoising.pairs, num_boxes * denoising.groups)
            work += [(f"_dn{suffix}", layer, *known) for suffix, layer in zip(suffixes, denoised, strict=True)]

        # All layers at once: many small operations would be slower.
        l1, giou = box_losses(
            torch.cat([predictions.boxes[p.image, p.query] for _, predictions, p, _ in work]),
            torch.cat([boxes[p.target] for _, _, p, _ in work]),
        )
        sizes = [len(p.query) for _, _, p, _ in work]
        losses = {}
        for (suffix, predictions, found, count), l1_part, giou_part in zip(
            work, l1.split(sizes), giou.split(sizes), strict=True
        ):
            classification = class_loss(predictions, found, labels)
            losses[f"loss_ce{suffix}"] = classification * (self.weights.classification / count)
            losses[f"loss_bbox{suffix}"] = l1_part.sum() * (self.weights.l1 / count)
            losses[f"loss_giou{suffix}"] = giou_part.sum() * (self.weights.giou / count)
        return losses


def boxes_per_process(count: int, like: Tensor) -> Tensor:
    """Number of boxes averaged over processes, at least 1."""
    total = like.new_full((), count)
    if comm.get_world_size() > 1:
        dist.all_reduce(total)
    return (total / comm.get_world_size()).clamp(min=1)
