"""Mixed matching of Align-DETR (arXiv 2304.07527): several queries learn from one object, the better ones more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dino_d2.geometry import cxcywh_to_xyxy, iou_and_generalized_iou
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import Pairs, Predictions, Targets

from .iou_aware import alignment

TEMPERATURE = 1.5  # ranks in which the weight falls by a factor e


class MixedMatcher(HungarianMatcher):
    """Each object stands several times in the assignment of all predictions but the last; its pairs are ranked.

    An image has as many copies of its objects as half of its queries are enough for, at least 1. (The published
    program takes the copies of a crowded image for the following images, too, and from half as many objects as queries
    on matches nothing.)

    Args:
        matcher: whose cost it is.
        copies: of each object, at least 1.
    """

    def __init__(self, matcher: HungarianMatcher, copies: int):
        self.matcher, self.copies = matcher, copies

    @torch.no_grad()
    def __call__(self, predictions: Sequence[Predictions], targets: Sequence[Targets]) -> list[Pairs]:
        *several, once = super().__call__(predictions, targets)
        if not several:
            return [once]
        weights = rank_weights(predictions[:-1], several, targets)
        return [*(replace(p, weight=w) for p, w in zip(several, weights, strict=True)), once]

    def cost(self, logits: Tensor, boxes: Tensor, target: Targets) -> Tensor:
        return self.matcher.cost(logits, boxes, target)

    def solve(self, costs: Sequence[Sequence[np.ndarray]]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        *several, once = costs
        return [[self._solve_copies(cost) for cost in images] for images in several] + super().solve([once])

    def _solve_copies(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries, objects = cost.shape
        copies = max(1, min(self.copies, queries // (2 * max(objects, 1))))
        query, column = linear_sum_assignment(np.tile(cost, (1, copies)))
        return query, column % max(objects, 1)


def rank_weights(
    predictions: Sequence[Predictions], pairs: Sequence[Pairs], targets: Sequence[Targets]
) -> Sequence[Tensor]:
    """exp(-rank / 1.5) of each pair, (M,) for each prediction; rank 0 is the best aligned pair of its object."""
    labels, boxes = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
    logits = torch.cat([x.logits[p.class_logits(labels)] for x, p in zip(predictions, pairs, strict=True)])
    predicted = torch.cat([x.boxes[p.image, p.query] for x, p in zip(predictions, pairs, strict=True)])
    target = torch.cat([p.target for p in pairs])
    iou, _ = iou_and_generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(boxes[target]))
    one_object = torch.cat([p.target + i * len(labels) for i, p in enumerate(pairs)])
    quality = alignment(logits, iou)
    weights = torch.exp(-ranks(quality, one_object).to(quality.dtype) / TEMPERATURE)
    return weights.split([len(p.target) for p in pairs])


def ranks(quality: Tensor, group: Tensor) -> Tensor:
    """Rank (M,) of each quality (M,) among those of its group (M,) int64: 0 is the best. Without waiting for the
    device."""
    best_first = quality.argsort(descending=True, stable=True)
    order = best_first[group[best_first].argsort(stable=True)]
    grouped = group[order]
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(grouped, grouped)
    return torch.empty_like(rank).scatter(0, order, rank)
