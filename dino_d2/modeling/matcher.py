"""One-to-one assignment of queries to objects (DETR, arXiv 2005.12872, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dino_d2.geometry import cxcywh_to_xyxy, generalized_iou
from dino_d2.structures import Pairs, Predictions, Targets

from .losses import FOCAL_ALPHA, FOCAL_GAMMA

NON_FINITE_COST = 1e6  # replaces NaN and infinite costs


class HungarianMatcher:
    """Finds the minimum-cost assignment for each image.

    The cost of a pair is `class_weight` * focal class cost + `l1_weight` * L1 distance of the boxes
    - `giou_weight` * their generalised IoU.
    """

    def __init__(self, class_weight: float, l1_weight: float, giou_weight: float):
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight

    @torch.no_grad()
    def __call__(self, predictions: Sequence[Predictions], targets: Sequence[Targets]) -> list[Pairs]:
        """Match several predictions of one batch, with a single device transfer in each direction.

        They are in the order of the network: the last one is that of the last decoder layer.

        A NaN or infinite prediction gets a high cost instead of raising an error, for which other processes would
        wait in vain. The losses are not finite then either, and the trainer handles that.
        """
        blocks = [self.cost(p.logits[i], p.boxes[i], target) for p in predictions for i, target in enumerate(targets)]
        on_host = torch.cat([block.flatten() for block in blocks]).nan_to_num(*[NON_FINITE_COST] * 3).cpu()
        costs = [
            part.view(block.shape).numpy()
            for part, block in zip(on_host.split([block.numel() for block in blocks]), blocks, strict=True)
        ]
        step = len(targets)
        solved = self.solve([costs[i : i + step] for i in range(0, len(costs), step)])
        pairs = [_pairs(images, targets) for images in solved]
        on_device = torch.cat(pairs, dim=1).to(blocks[0].device, non_blocking=True)
        return [Pairs(*part.unbind()) for part in on_device.split([part.shape[1] for part in pairs], dim=1)]

    def cost(self, logits: Tensor, boxes: Tensor, target: Targets) -> Tensor:
        """Cost of each (query, object) pair: logits (Q, K) and boxes (Q, 4) -> (Q, n)."""
        probability = logits.sigmoid()[:, target.labels]
        distance = (boxes[:, None] - target.boxes[None]).abs().sum(-1)
        overlap = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
        class_cost = self.class_cost(probability, overlap)
        return self.class_weight * class_cost + self.l1_weight * distance - self.giou_weight * overlap

    def class_cost(self, probability: Tensor, overlap: Tensor) -> Tensor:
        """Focal class cost of each pair: probability and generalised IoU (Q, n) -> (Q, n)."""
        positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
        negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
        return positive - negative

    def solve(self, costs: Sequence[Sequence[np.ndarray]]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Assign: finite costs (Q, n) per prediction and image -> query and object indices per prediction and image."""
        return [[linear_sum_assignment(cost) for cost in images] for images in costs]


def _pairs(solved: Sequence[tuple[np.ndarray, np.ndarray]], targets: Sequence[Targets]) -> Tensor:
    """Image, query and batch-wide object index of each pair, (3, M), from the query and object indices per image."""
    pairs = []
    first = 0
    for i, (found, target) in enumerate(zip(solved, targets, strict=True)):
        query, number = (torch.as_tensor(index, dtype=torch.int64) for index in found)
        pairs.append(torch.stack([torch.full_like(query, i), query, first + number]))
        first += len(target)
    return torch.cat(pairs, dim=1)
