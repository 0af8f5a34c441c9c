"""Multi-scale deformable attention in plain PyTorch: the reference for testing the kernels, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`ms_deform_attn` with `grid_sample` on each level; differentiable, on any device.

    Arguments and result as in :func:`dino_d2.ops.ms_deform_attn`.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    grids = 2 * sampling_locations - 1  # grid_sample uses [-1, 1]
    sampled = []
    tokens_of_level = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, ((height, width), tokens) in enumerate(zip(spatial_shapes, tokens_of_level, strict=True)):
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled.append(F.grid_sample(maps, grid.to(maps.dtype), "bilinear", "zeros", align_corners=False))
    samples = torch.stack(sampled, dim=-2).flatten(-2)  # (batch * heads, channels, queries, levels * points)
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (samples * weights.to(samples.dtype)).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn_fused` in separate steps; differentiable, on any device.

    Arguments and result as in :func:`dino_d2.ops.ms_deform_attn_fused`.
    """
    locations = sampling_locations_of(reference, sampling_offsets, spatial_shapes)
    return ms_deform_attn_reference(value, spatial_shapes, locations, attention_weights_of(attention_logits))


def attention_weights_of(attention_logits: Tensor) -> Tensor:
    """Softmax over levels and points: (B, Q, heads, L, points) -> (B, Q, heads, L, points)."""
    return attention_logits.flatten(-2).softmax(-1).view_as(attention_logits)


def sampling_locations_of(
    reference: Tensor, sampling_offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """Compute sampling locations: offsets from points are in pixels of the level, from boxes in half sizes / points.

    Args:
        reference: (B, Q, L, 2) or (B, Q, L, 4) in [0, 1].
        sampling_offsets: (B, Q, heads, L, points, 2).

    Returns:
        Locations in [0, 1], of the shape of `sampling_offsets`.
    """
    reference = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        one = reference.new_ones(())  # sizes may be symbolic: new_tensor would make constants of them
        sizes = torch.stack([one * size for height, width in spatial_shapes for size in (width, height)]).view(-1, 1, 2)
        return reference + sampling_offsets / sizes
    points = sampling_offsets.shape[-2]
    return reference[..., :2] + sampling_offsets / points * reference[..., 2:] * 0.5
