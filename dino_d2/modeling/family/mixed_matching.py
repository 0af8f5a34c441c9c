"""Mixed matching of Align-DETR (arXiv 2304.07527): several queries per object, weighted by rank."""

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

TEMPERATURE = 1.5  # the weight of a pair is exp(-rank / TEMPERATURE)


class MixedMatcher(HungarianMatcher):
    """Repeats each object in the assignment of all predictions except the last, and ranks its pairs.

    The number of copies is reduced for images where they would take more than half of the queries, but not below 1.
    (The official code keeps the reduced number for the following images of the batch, and matches nothing once there
    are more objects than half the queries.)

    Args:
        matcher: computes the cost.
        copies: of each object, at least 1.
    """

    def __init__(self, matcher: HungarianMatcher, copies: int):
        super().__init__(matcher.class_weight, matcher.l1_weight, matcher.giou_weight)
        self.matcher, self.copies = matcher, copies

    @torch.no_grad()
    def __call__(self, predictions: Sequence[Predictions], targets: Sequence[Targets]) -> list[Pairs]:
        *earlier, last = super().__call__(predictions, targets)
        if not earlier:
            return [last]
        weights = rank_weights(predictions[:-1], earlier, targets)
        return [*(replace(p, weight=w) for p, w in zip(earlier, weights, strict=True)), last]

    def cost(self, logits: Tensor, boxes: Tensor, target: Targets) -> Tensor:
        return self.matcher.cost(logits, boxes, target)

    def solve(self, costs: Sequence[Sequence[np.ndarray]]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        *earlier, last = costs
        return [[self._solve_copies(cost) for cost in images] for images in earlier] + super().solve([last])

    def _solve_copies(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        queries, objects = cost.shape
        copies = max(1, min(self.copies, queries // (2 * max(objects, 1))))
        query, column = linear_sum_assignment(np.tile(cost, (1, copies)))
        return query, column % max(objects, 1)


def rank_weights(
    predictions: Sequence[Predictions], pairs: Sequence[Pairs], targets: Sequence[Targets]
) -> Sequence[Tensor]:
    """Weight exp(-rank / 1.5) of each pair, one tensor (M,) per prediction.

    Rank 0 is the pair of highest :func:`alignment` among those of the same object in the same prediction.
    """
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
    """Rank of each quality (M,) within its group (M,) int64, 0 for the highest -> (M,) int64. Does not synchronise with
    the device."""
    best_first = quality.argsort(descending=True, stable=True)
    order = best_first[group[best_first].argsort(stable=True)]
    grouped = group[order]
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(grouped, grouped)
    return torch.empty_like(rank).scatter(0, order, rank)
