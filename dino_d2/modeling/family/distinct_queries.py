"""Distinct queries of DDQ (arXiv 2303.12776, section 3.2): of tokens that propose the same box, only the best."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from dino_d2.geometry import cxcywh_to_xyxy
from dino_d2.modeling.query_selection import EncoderProposals, gather
from dino_d2.structures import topk

CANDIDATES = 3  # times the number of queries


class DistinctProposals(EncoderProposals):
    """Skips tokens whose box overlaps that of a better token, whatever their classes.

    Where too few are left, the best of those skipped fill the places at the end.

    Args:
        iou: above which boxes count as the same.
    """

    def __init__(self, embed_dim: int, class_head: nn.Module, box_head: nn.Module, iou: float):
        super().__init__(embed_dim, class_head, box_head)
        self.iou = iou

    def select(self, features: Tensor, logits: Tensor, proposal_logits: Tensor, num_queries: int) -> Tensor:
        scores, candidates = topk(logits.max(-1).values, CANDIDATES * num_queries)
        boxes = (self.box_head(gather(features, candidates)) + gather(proposal_logits, candidates)).sigmoid()
        skipped = torch.ones_like(candidates)
        for corners, of_image, marks in zip(cxcywh_to_xyxy(boxes), scores, skipped, strict=True):
            marks[nms(corners.float(), of_image.float(), self.iou)] = 0
        order = skipped.argsort(dim=1, stable=True)
        return candidates.gather(1, order[:, :num_queries])
