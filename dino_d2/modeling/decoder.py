"""The decoder: self-attention, cross-attention to the memory, and class and box predictions after every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dino_d2.structures import Memory, Predictions, Queries

from .box_refinement import Refinement
from .deformable_attention import MultiScaleDeformableAttention
from .layers import MLP, FeedForward, box_head, maybe_checkpoint
from .position_encoding import anchor_embedding

PRIOR_PROBABILITY = 0.01  # initial probability of each class (focal loss, arXiv 1708.02002, section 4.1)


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """Linear class head, initialised to predict `PRIOR_PROBABILITY`."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return head


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward; post-norm."""

    def __init__(self, self_attention: nn.MultiheadAttention, cross_attention: MultiScaleDeformableAttention,
                 ffn: FeedForward):  # fmt: skip
        super().__init__()
        embed_dim = self_attention.embed_dim
        self.self_attn = self_attention
        self.self_attn_norm = nn.LayerNorm(embed_dim)
        self.cross_attn = cross_attention
        self.cross_attn_norm = nn.LayerNorm(embed_dim)
        self.ffn = ffn
        self.dropout = nn.Dropout(ffn.dropout.p)

    def forward(
        self, content: Tensor, position: Tensor, reference: Tensor, memory: Memory, attention_mask: Tensor | None
    ) -> Tensor:
        """
        Args:
            content, position: (B, Q, C).
            reference: (B, Q, L, 4), the anchors in [0, 1] of each padded level.
            attention_mask: (Q, Q) or (B * heads, Q, Q) bool, True = blocked; None: no mask.
        """
        query = content + position
        attended, _ = self.self_attn(query, query, content, attn_mask=attention_mask, need_weights=False)
        content = self.self_attn_norm(content + self.dropout(attended))
        attended = self.cross_attn(content + position, reference, memory)
        content = self.cross_attn_norm(content + self.dropout(attended))
        return self.ffn(content)


class DINODecoder(nn.Module):
    """Decoder layers with iterative box refinement and prediction heads.

    Args:
        layers: applied in turn.
        embed_dim: C.
        num_classes: K.
        refine: `look_forward_twice` or `look_forward_once`.
        share_heads: share the class and box head between layers, as published; else one of each per layer.
        recompute: use activation checkpointing, layer by layer.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embed_dim: int,
        num_classes: int,
        refine: Callable[[Tensor, Tensor, Tensor, Tensor], Refinement],
        share_heads: bool,
        recompute: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.query_position = MLP(2 * embed_dim, embed_dim, embed_dim, num_layers=2)
        self.num_classes = num_classes
        num_heads = 1 if share_heads else len(layers)
        self.class_heads = nn.ModuleList(class_head(embed_dim, num_classes) for _ in range(num_heads))
        self.box_heads = nn.ModuleList(box_head(embed_dim) for _ in range(num_heads))
        self.refine, self.recompute = refine, recompute

    def forward(self, queries: Queries, memory: Memory, attention_mask: Tensor | None = None) -> list[Predictions]:
        """Predictions of every layer, first to last. `attention_mask`: see :class:`DecoderLayer`."""
        content, anchor, reference = queries.content, queries.anchors, queries.anchors
        level_scale = torch.cat([memory.valid_ratios, memory.valid_ratios], dim=-1)[:, None]  # (B, 1, L, 4)
        predictions = []
        for i, layer in enumerate(self.layers):
            anchor_on_levels = anchor[:, :, None] * level_scale
            position = self.query_position(anchor_embedding(anchor_on_levels[:, :, 0], content.shape[-1] // 2))
            inputs = (content, position, anchor_on_levels, memory, attention_mask)
            content = maybe_checkpoint(layer, *inputs, recompute=self.recompute)
            normed = self.norm(content)
            head = i % len(self.box_heads)  # 0 for shared heads
            delta, normed_delta = self.box_heads[head](torch.stack([content, normed])).unbind()
            boxes, anchor, reference = self.refine(anchor, reference, delta, normed_delta)
            predictions.append(Predictions(self.class_heads[head](normed), boxes))
        return predictions
