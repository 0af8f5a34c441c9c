"""Multi-scale deformable attention from standard operators, for export."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_d2.ops import attention_weights_of


def ms_deform_attn_gather(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn_fused` with table lookups; sizes may be symbolic.

    `grid_sample` would compute every location once per channel. Here each row of the table holds all channels of a
    pixel and its right neighbour, so that two lookups give the four pixels of a bilinear sample. A border of zeros
    represents everything outside the level.

    Arguments and result as in :func:`dino_d2.ops.ms_deform_attn_fused`; not for training.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[-2]
    image = torch.arange(batch, device=value.device)[:, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None]
    reference, offsets = reference.to(torch.float32), sampling_offsets.to(torch.float32)
    weights = attention_weights_of(attention_logits.to(torch.float32))
    output = value.new_zeros(batch, queries, heads, channels, dtype=torch.float32)
    tokens_of_level = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, ((height, width), tokens) in enumerate(zip(spatial_shapes, tokens_of_level, strict=True)):
        bordered = F.pad(tokens.reshape(batch, height, width, -1), (0, 0, 1, 1, 1, 1)).unflatten(-1, (heads, channels))
        table = torch.stack([bordered[:, :, :-1], bordered[:, :, 1:]], dim=-2).reshape(-1, 2 * channels)

        x, y = _pixels(reference[:, :, None, level, None], offsets[:, :, :, level], height, width)
        left, top = x.floor().clamp(max=width - 1), y.floor().clamp(max=height - 1)
        to_right, to_bottom = x - left, y - top
        upper, lower = weights[:, :, :, level] * (1 - to_bottom), weights[:, :, :, level] * to_bottom
        share = torch.stack(
            [upper * (1 - to_right), upper * to_right, lower * (1 - to_right), lower * to_right], dim=-1
        ).flatten(-2)

        per_line = width + 1  # pairs of neighbours in a line with border
        row = ((image * (height + 2) + top.long() + 1) * per_line + left.long() + 1) * heads + head
        rows = torch.stack([row, row + per_line * heads], dim=-1)
        pixels = F.embedding(rows, table).reshape(batch, queries, heads, 4 * points, channels)
        output = output + torch.matmul(share[..., None, :], pixels.to(torch.float32)).squeeze(-2)
    return output.flatten(-2).to(value.dtype)


def _pixels(reference: Tensor, offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Locations x and y on one level in pixels, 0 = centre of the first pixel, clamped to one pixel outside.

    Args:
        reference: (B, Q, 1, 1, 2 or 4) in [0, 1].
        offsets: (B, Q, heads, points, 2).
    """
    if reference.shape[-1] == 2:
        x, y = reference[..., 0] * width + offsets[..., 0], reference[..., 1] * height + offsets[..., 1]
    else:
        move = offsets / offsets.shape[-2] * reference[..., 2:] * 0.5
        x, y = (reference[..., 0] + move[..., 0]) * width, (reference[..., 1] + move[..., 1]) * height
    return (x - 0.5).clamp(-1, width), (y - 0.5).clamp(-1, height)
