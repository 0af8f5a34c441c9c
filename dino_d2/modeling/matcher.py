"""One-to-one assignment of queries to objects (DETR, arXiv 2005.12872, equation 1)."""

from __future__ import annotations

from collections.abc import Sequence

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
        """Match several predictions (layers) of one batch, with a single device transfer in each direction.

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
        pairs = [_pairs(costs[i : i + step]) for i in range(0, len(costs), step)]
        on_device = torch.cat(pairs, dim=1).to(blocks[0].device, non_blocking=True)
        return [Pairs(*part.unbind()) for part in on_device.split([part.shape[1] for part in pairs], dim=1)]

    def cost(self, logits: Tensor, boxes: Tensor, target: Targets) -> Tensor:
        """Cost of each (query, object) pair: logits (Q, K) and boxes (Q, 4) -> (Q, n)."""
        probability = logits.sigmoid()[:, target.labels]
        positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * -(probability + 1e-8).log()
        negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * -(1 - probability + 1e-8).log()
        distance = (boxes[:, None] - target.boxes[None]).abs().sum(-1)
        overlap = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
        return self.class_weight * (positive - negative) + self.l1_weight * distance - self.giou_weight * overlap


def _pairs(costs: list) -> Tensor:
    """Solve one cost matrix (Q, n) per image. Returns image, query and batch-wide object index of each pair, (3, M)."""
    pairs = []
    first = 0
    for i, cost in enumerate(costs):
        query, target = (torch.as_tensor(index, dtype=torch.int64) for index in linear_sum_assignment(cost))
        pairs.append(torch.stack([torch.full_like(query, i), query, first + target]))
        first += cost.shape[1]
    return torch.cat(pairs, dim=1)
