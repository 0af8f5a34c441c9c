"""Multi-scale deformable attention in plain PyTorch: the truth that the kernels are tested against."""

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
    """What `ms_deform_attn` computes, level by level through `grid_sample`; differentiable, on any device.

    Arguments and result are those of :func:`dino_d2.ops.ms_deform_attn`.
    """
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_locations.shape[1], *sampling_locations.shape[3:5]
    grids = 2 * sampling_locations - 1  # grid_sample counts from -1 to 1
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
