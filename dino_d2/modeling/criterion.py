"""From predictions and targets to the weighted losses."""

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
    """Weights of the losses, the same at every layer; the sum of the weighted losses is the objective."""

    classification: float
    l1: float
    giou: float


class SetCriterion:
    """Losses of the proposals, of every decoder layer and of its denoising part.

    Names: `loss_ce`, `loss_bbox`, `loss_giou` for the last layer; `_0`, `_1`, … for the earlier ones, `_dn`
    (`_dn_0`, …) for the denoising part, `_interm` for the proposals.
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
            layers: of each decoder layer, for the denoising queries followed by the matching queries.
            proposals: of the encoder; None where queries are learned.
            denoising: what is known of the denoising queries.
            targets: of each image.
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

        # The boxes of all layers at once: many small operations would cost more than the arithmetic.
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
    """Number of boxes of an average process, at least 1."""
    total = like.new_full((), count)
    if comm.get_world_size() > 1:
        dist.all_reduce(total)
    return (total / comm.get_world_size()).clamp(min=1)
