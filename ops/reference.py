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

    Arguments, precision and result as in :func:`dino_d2.ops.ms_deform_attn`, without its checks. `grid_sample` itself
    would compute the pixels of 16-bit values in 16 bits, and on a CPU read outside their memory.
    """
    stored, accumulate = value.dtype, accumulation_dtype(value)
    value, attention_weights = value.to(accumulate), attention_weights.to(accumulate)
    sampling_locations = _without_infinity(sampling_locations.to(accumulate))
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    grids = 2 * sampling_locations - 1  # grid_sample uses [-1, 1]
    sampled = []
    tokens_of_level = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, ((height, width), tokens) in enumerate(zip(spatial_shapes, tokens_of_level, strict=True)):
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled.append(F.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False))
    samples = torch.stack(sampled, dim=-2).flatten(-2)  # (batch * heads, channels, queries, levels * points)
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (samples * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous().to(stored)


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn_fused` in separate steps; differentiable, on any device.

    Arguments, precision and result as in :func:`dino_d2.ops.ms_deform_attn_fused`, without its checks.
    """
    accumulate = accumulation_dtype(value)
    locations = sampling_locations_of(reference.to(accumulate), sampling_offsets.to(accumulate), spatial_shapes)
    weights = attention_weights_of(attention_logits.to(accumulate))
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


def accumulation_dtype(value: Tensor) -> torch.dtype:
    """The dtype of locations, weights and sums for values of any dtype."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


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


def _without_infinity(locations: Tensor) -> Tensor:
    """Locations whose samples and gradients are the same, but zero where a coordinate is NaN or infinite.

    -1 and 2 are at least a pixel outside of every level, so that nothing is sampled there.
    """
    return locations.nan_to_num(nan=-1.0, posinf=2.0, neginf=-1.0).clamp(-1, 2)
