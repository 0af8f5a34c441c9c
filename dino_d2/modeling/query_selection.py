"""Where the decoder's queries come from (paper section 3.4).

To reuse this file in another DETR, see docs/lifting.md. The heads that score tokens are given to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..structures import Memory, Predictions, Queries, topk

SMALLEST_PROPOSAL = 0.05  # relative to the image, at the finest level; doubles with each level
VALID_RANGE = (0.01, 0.99)


@dataclass
class Selection:
    """Queries and the tokens that they were selected from.

    proposals: the encoder's predictions for these tokens; None for learned queries.
    tokens: (B, Q) int64, indices of these tokens; (B, 0) for learned queries.
    """

    queries: Queries
    proposals: Predictions | None
    tokens: Tensor


@dataclass
class Proposals:
    """The Q highest-scoring tokens of each image.

    tokens: (B, Q) int64, their indices.
    features: (B, Q, C).
    predictions: logits and boxes from the two heads.
    """

    tokens: Tensor
    features: Tensor
    predictions: Predictions


def token_proposals(memory: Memory) -> tuple[Tensor, Tensor]:
    """One box per token: its centre, and a size that doubles with each level.

    Returns:
        logits of the boxes (B, N, 4), infinite for invalid tokens: those on padding and those whose box has a
        coordinate outside (0.01, 0.99); and the validity of each token, (B, N) bool.
    """
    centre = memory.token_centres()
    size = torch.cat(
        [
            centre.new_full((height * width, 2), SMALLEST_PROPOSAL * 2**level)
            for level, (height, width) in enumerate(memory.spatial_shapes)
        ]
    )
    box = torch.cat([centre, size.expand_as(centre)], dim=-1).expand(memory.tokens.shape[0], -1, -1)
    low, high = VALID_RANGE
    valid = ((box > low) & (box < high)).all(-1)
    if memory.padding_mask is not None:
        valid = valid & ~memory.padding_mask
    return torch.logit(box).masked_fill(~valid[..., None], torch.inf), valid


def filter_by_score(selection: Selection, threshold: float) -> tuple[Queries, Tensor]:
    """Keep the queries of tokens that score above a threshold, and at least the best one of each image.

    Synchronises with the device once, to read the largest number of such queries in an image.

    Args:
        selection: with proposals, best first.
        threshold: of the best class's sigmoid, in [0, 1).

    Returns:
        that many queries for every image; and which of them pass the threshold, (B, Q) bool.
    """
    valid = selection.proposals.logits.max(-1).values.sigmoid() > threshold
    valid[:, 0] = True
    count = int(valid.sum(1).max())
    queries = selection.queries
    return Queries(queries.content[:, :count], queries.anchors[:, :count]), valid[:, :count]


class EncoderProposals(nn.Module):
    """Scores every token with its own class and box head, and keeps the best.

    Args:
        embed_dim: C.
        class_head: (…, C) -> (…, K) logits.
        box_head: (…, C) -> (…, 4) logit-space offsets.
    """

    def __init__(self, embed_dim: int, class_head: nn.Module, box_head: nn.Module):
        super().__init__()
        self.project = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.class_head = class_head
        self.box_head = box_head

    def forward(self, memory: Memory, num_queries: int) -> Proposals:
        """The best min(num_queries, N) tokens. The box head runs only on those.

        In training, tokens are ranked without gradients, and the selected ones go through projection and class head
        again. This keeps activations of Q tokens instead of N and does not change gradients, since all others are 0.
        """
        proposal_logits, valid = token_proposals(memory)
        tokens = memory.tokens.masked_fill(~valid[..., None], 0)
        with torch.no_grad(), _autocast_without_cache(tokens.device.type):
            features, logits = self.score(tokens)
            # Tiny images have fewer tokens than queries.
            _, best = topk(logits.max(-1).values, num_queries)
        if torch.is_grad_enabled():
            features, logits = self.score(_gather(tokens, best))
        else:
            features, logits = _gather(features, best), _gather(logits, best)
        boxes = (self.box_head(features) + _gather(proposal_logits, best)).sigmoid()
        return Proposals(best, features, Predictions(logits, boxes))

    def score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, C) -> features (B, n, C) and class logits (B, n, K)."""
        features = self.norm(self.project(tokens))
        return features, self.class_head(features)


class MixedQuerySelection(nn.Module):
    """Anchors from the best tokens, learned content: DINO's choice (paper section 3.4).

    `num_queries` can be lowered after training: fewer tokens are selected, with the first content queries.
    """

    def __init__(self, num_queries: int, embed_dim: int, proposals: EncoderProposals):
        super().__init__()
        self.num_queries = num_queries
        self.proposals = proposals
        self.content = nn.Embedding(num_queries, embed_dim)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory) -> Selection:
        best = self.proposals(memory, self.num_queries)
        batch, queries = best.tokens.shape
        content = self.content.weight[:queries].expand(batch, -1, -1)
        return Selection(Queries(content, best.predictions.boxes.detach()), best.predictions, best.tokens)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Refuse incomplete weights: checkpointers that drop tensors of another shape would leave the content random.

        Raises:
            ValueError: the weights have the proposals but not the content.
        """
        if f"{prefix}proposals.project.weight" in state_dict and f"{prefix}content.weight" not in state_dict:
            raise ValueError(
                "The weights have no content queries, or their number is not MODEL.DINO.NUM_QUERIES, "
                f"{self.num_queries}, so they were dropped. Load them with dino_d2.checkpoint.DINOCheckpointer, which "
                "takes the first ones, or build the model with as many queries as were trained and lower "
                "model.query_selection.num_queries after loading."
            )
        super()._load_from_state_dict(state_dict, prefix, *others)


class PureQuerySelection(nn.Module):
    """Anchors and content from the best tokens, both detached (two-stage Deformable DETR)."""

    def __init__(self, num_queries: int, proposals: EncoderProposals):
        super().__init__()
        self.num_queries = num_queries
        self.proposals = proposals

    def forward(self, memory: Memory) -> Selection:
        best = self.proposals(memory, self.num_queries)
        queries = Queries(best.features.detach(), best.predictions.boxes.detach())
        return Selection(queries, best.predictions, best.tokens)


class StaticQueries(nn.Module):
    """Learned anchors and content, the same for every image (DAB-DETR, DN-DETR)."""

    def __init__(self, num_queries: int, embed_dim: int):
        super().__init__()
        self.content = nn.Embedding(num_queries, embed_dim)
        self.anchor_logits = nn.Embedding(num_queries, 4)
        nn.init.xavier_uniform_(self.content.weight)

    def forward(self, memory: Memory) -> Selection:
        batch = memory.tokens.shape[0]
        content = self.content.weight.expand(batch, -1, -1)
        queries = Queries(content, self.anchor_logits.weight.sigmoid().expand(batch, -1, -1))
        return Selection(queries, None, torch.empty(batch, 0, dtype=torch.int64, device=content.device))


def _autocast_without_cache(device_type: str) -> torch.autocast:
    """The current autocast without its weight cache: older versions of PyTorch would reuse casts made without gradients
    where gradients are needed."""
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype, enabled, cache_enabled=False)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, Q) of `x` (B, N, C): (B, Q, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
