"""The deformable encoder: from feature maps to refined tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dino_d2.constants import constant
from dino_d2.structures import Memory, map_sizes

from .deformable_attention import MultiScaleDeformableAttention
from .layers import FeedForward, maybe_checkpoint
from .position_encoding import pixel_embedding


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then feed-forward; post-norm."""

    def __init__(self, attention: MultiScaleDeformableAttention, ffn: FeedForward):
        super().__init__()
        embed_dim = ffn.linear1.in_features
        self.self_attn = attention
        self.self_attn_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(ffn.dropout.p)
        self.ffn = ffn

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Memory:
        return replace(memory, tokens=self.update(memory.tokens, position, reference, memory))

    def update(self, tokens: Tensor, position: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Update a subset of tokens (B, Q, C), with their position (B, Q, C) and reference (B, Q, L, 2)."""
        attended = self.self_attn(tokens + position, reference, memory)
        return self.ffn(self.self_attn_norm(tokens + self.dropout(attended)))


class DeformableEncoder(nn.Module):
    """Flattens L feature maps into one sequence of N tokens and refines them.

    Args:
        layers: (memory, position, reference) -> memory, applied in turn.
        embed_dim: C.
        num_levels: L.
        temperature, offset: of the sine position embedding.
        recompute: use activation checkpointing, layer by layer.
        strides: of the L maps, in pixels, to place tokens by; None: each map is spread over the image, as published. A
            map has whole tokens, so its last one may reach beyond the image: spreading shifts tokens by up to one.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        embed_dim: int,
        num_levels: int,
        temperature: float,
        offset: float,
        recompute: bool = False,
        strides: Sequence[int] | None = None,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        self.temperature, self.offset, self.recompute = temperature, offset, recompute
        self.strides = tuple(strides) if strides else None

    def forward(
        self, features: Sequence[Tensor], padding_mask: Tensor | None, image_size: tuple[int, int] | None = None
    ) -> Memory:
        """
        Args:
            features: L maps (B, C, h, w).
            padding_mask: (B, H, W) bool, True on padding; None: no image is padded.
            image_size: H and W; needed if tokens are placed by strides.
        """
        memory, position = self.flatten(features, padding_mask)
        if self.strides:
            memory = replace(memory, valid_sizes=self.sizes_by_stride(memory.valid_sizes, padding_mask, image_size))
        return self.refine(memory, position, memory.token_centres()[:, :, None] * memory.valid_ratios[:, None])

    def refine(self, memory: Memory, position: Tensor, reference: Tensor) -> Memory:
        """Apply the layers; position (B, N, C), reference (B, N, L, 2)."""
        for layer in self.layers:
            memory = maybe_checkpoint(layer, memory, position, reference, recompute=self.recompute)
        return memory

    def sizes_by_stride(self, counts: Tensor, padding_mask: Tensor | None, image_size: tuple[int, int]) -> Tensor:
        """Width and height of each unpadded image in tokens of each level, with fractions, (B, L, 2).

        Args:
            counts: (B, L, 2), of dtype and device of the result.
        """
        if padding_mask is None:
            pixels = map_sizes((image_size,), counts.dtype, counts.device)[None].expand(len(counts), -1, -1)
        else:
            pixels = _valid_size(padding_mask, counts.dtype)[:, None]
        return pixels / column_of(self.strides, counts.dtype, counts.device)

    def flatten(self, features: Sequence[Tensor], padding_mask: Tensor | None) -> tuple[Memory, Tensor]:
        """Flatten the maps to tokens; also returns the position and level embedding of each token, (B, N, C)."""
        dtype = torch.promote_types(self.level_embed.dtype, torch.float32)  # geometry needs at least float32
        batch, channels = features[0].shape[:2]
        device = features[0].device
        shapes = tuple((feature.shape[-2], feature.shape[-1]) for feature in features)
        if padding_mask is None:
            token_mask, valid_sizes = None, map_sizes(shapes, dtype, device).expand(batch, -1, -1)
            position = position_on_map(shapes, channels, self.temperature, self.offset, dtype, device)[None]
        else:
            masks = [_resize_mask(padding_mask, shape) for shape in shapes]
            token_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
            valid_sizes = torch.stack([_valid_size(mask, dtype) for mask in masks], dim=1)
            position = _embed(masks, channels, self.temperature, self.offset, dtype)
        sizes = [height * width for height, width in shapes]
        levels = zip(position.split(sizes, dim=1), self.level_embed, strict=True)
        position = torch.cat([level + embed for level, embed in levels], dim=1)
        return Memory(_flatten(features), token_mask, shapes, valid_sizes), position.expand(batch, -1, -1)


@constant
def column_of(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, 1), copied to the device once."""
    return torch.tensor(numbers, dtype=dtype, device=device)[:, None]


@constant
def position_on_map(
    spatial_shapes: tuple[tuple[int, int], ...],
    channels: int,
    temperature: float,
    offset: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sine embedding of every pixel of L unpadded maps, (N, channels). See :func:`pixel_embedding`."""
    masks = [torch.zeros(1, *shape, dtype=torch.bool, device=device) for shape in spatial_shapes]
    return _embed(masks, channels, temperature, offset, dtype)[0]


def _embed(masks: Sequence[Tensor], *how: object) -> Tensor:
    return _flatten([pixel_embedding(mask, *how) for mask in masks])


def _flatten(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """`F.interpolate(mode="nearest")`, written out because ONNX rounds differently and would include padding."""
    rows, columns = (_nearest(*sizes, mask.device) for sizes in zip(mask.shape[-2:], size, strict=True))
    return mask.index_select(1, rows).index_select(2, columns)


def _nearest(size: int, new_size: int, device: torch.device) -> Tensor:
    step = torch.full((1,), size, dtype=torch.float32, device=device) / new_size
    return (torch.arange(new_size, device=device) * step).long()


def _valid_size(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Number of unpadded columns and rows, (B, 2)."""
    inside = ~mask
    return torch.stack([inside[:, 0].sum(-1), inside[:, :, 0].sum(-1)], dim=-1).to(dtype)
