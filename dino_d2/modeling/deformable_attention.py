"""The deformable-attention layer around the op (Deformable DETR, arXiv 2010.04159, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dino_d2.ops import ms_deform_attn_fused
from dino_d2.structures import Memory

from .int8 import QuantizableLinear


class MultiScaleDeformableAttention(nn.Module):
    """Each head of each query samples `num_points` locations per level.

    Args:
        embed_dim: C, a multiple of `num_heads`.
        num_levels: L.
        num_points: samples per head and level.
        op: `dino_d2.ops.ms_deform_attn_fused`, or its reference.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        op: Callable[..., Tensor] = ms_deform_attn_fused,
    ):
        super().__init__()
        self.op = op
        if embed_dim % num_heads:
            raise ValueError(f"HIDDEN_DIM {embed_dim} must be a multiple of NHEADS {num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = QuantizableLinear(embed_dim, samples * 2)
        self.attention_weights = QuantizableLinear(embed_dim, samples)
        self.value_proj = QuantizableLinear(embed_dim, embed_dim)
        self.output_proj = QuantizableLinear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point the heads in `num_heads` directions, with point p at distance p + 1 and equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().max(dim=-1, keepdim=True).values
        distances = torch.arange(1, self.num_points + 1)
        ring = directions[:, None, None, :] * distances[None, None, :, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(layer)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """
        Args:
            query: (B, Q, C), with position embedding.
            reference: (B, Q, L, 2) points, or (B, Q, L, 4) boxes cx, cy, w, h; in [0, 1] of the padded level.
            memory: the sampled tokens; padding counts as zero.

        Returns:
            (B, Q, C).
        """
        shape = (*query.shape[:2], self.num_heads, self.num_levels, self.num_points)
        value = memory.without_padding(self.value_proj(memory.tokens))
        output = self.op(
            value.unflatten(-1, (self.num_heads, -1)),
            memory.spatial_shapes,
            reference,
            self.sampling_offsets(query).view(*shape, 2),
            self.attention_weights(query).view(shape),
        )
        return self.output_proj(output)
