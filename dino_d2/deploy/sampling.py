"""Multi-scale deformable attention from standard operators, for export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_d2.ops import attention_weights_of
from dino_d2.structures import map_sizes


def _weighted_rows(value: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    """For every query and head the sum of some tokens' values, weighted.

    One head after the other, so that the looked-up values use the same memory.

    Args:
        value: (B, N, heads, channels).
        rows: (B, Q, heads, K) int32, tokens of the image.
        shares: (B, Q, heads, K) float32.

    Returns:
        (B, Q, heads * channels), in the type of `value`.
    """
    batch, tokens, heads, channels = value.shape
    rows = rows + tokens * torch.arange(batch, dtype=rows.dtype, device=value.device)[:, None, None, None]
    tables = value.permute(2, 0, 1, 3).reshape(heads, batch * tokens, channels)
    outputs = []
    for head in range(heads):
        values = F.embedding(rows[:, :, head], tables[head])  # (B, Q, K, channels)
        outputs.append(torch.matmul(shares[:, :, head, None], values.float()))
    return torch.cat(outputs, dim=-1).squeeze(2).to(value.dtype)


weighted_rows = torch.library.custom_op("dino_d2::weighted_rows", _weighted_rows, mutates_args=())


@weighted_rows.register_fake
def _(value: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    batch, queries, heads, _ = rows.shape
    return value.new_empty(batch, queries, heads * value.shape[-1])


def ms_deform_attn_gather(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    look_up: Callable[[Tensor, Tensor, Tensor], Tensor] = _weighted_rows,
) -> Tensor:
    """`ms_deform_attn_fused` with table lookups; sizes may be symbolic.

    `grid_sample` would compute every location once per channel. Here the tokens of a head are a table, and a lookup of
    the four pixels of every sample is followed by one product with their shares. x and y and all levels are computed at
    once, so that the graph is small. Samples of a query are the last dimension, because onnxruntime is slow at
    broadcasting along short ones.

    Arguments and result as in :func:`dino_d2.ops.ms_deform_attn_fused`, and `look_up`: `weighted_rows` or its steps.
    Not for training.
    """
    device = value.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        rows, shares = _lookups(spatial_shapes, reference.float(), sampling_offsets.float(), attention_logits.float())
        return look_up(value, rows, shares)


# With one operator, which `export` translates: tracing and converting its steps is a sixth of an export's time.
ms_deform_attn_for_onnx = partial(ms_deform_attn_gather, look_up=weighted_rows)


def _lookups(
    spatial_shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The four pixels of every sample, as tokens of the image, and their shares in the result: (B, Q, heads, 4 * L *
    points), int32 and float32.

    The share of a pixel is max(0, 1 - distance) in x and in y. The pixels are always on the level: where a sample lies
    outside, the nearest ones are taken, and their shares follow from the distance. A level one pixel wide has no
    right neighbour: its share is 0, and the pixel itself is taken.
    """
    batch, queries, heads, levels, points, _ = offsets.shape
    sizes = map_sizes(spatial_shapes, torch.float32, offsets.device)  # (L, 2): width, height
    # Levels to samples: a product with zeros and ones repeats numbers faster than broadcasting.
    spread = torch.eye(levels, device=offsets.device)[:, None, :, None].expand(-1, heads, -1, points).flatten(1)
    offsets = offsets.flatten(2, 4).permute(3, 0, 1, 2)  # (2, B, Q, samples)
    centres = torch.matmul((reference[..., :2] * sizes - 0.5).permute(3, 0, 1, 2), spread)
    if reference.shape[-1] == 2:
        places = centres + offsets
    else:
        steps = torch.matmul((reference[..., 2:] * (sizes * (0.5 / points))).permute(3, 0, 1, 2), spread)
        places = centres + offsets * steps

    size = torch.matmul(sizes.t(), spread)[:, None, None]  # (2, 1, 1, samples)
    last = size - 1
    pixel = torch.minimum(places.floor(), last - 1).clamp(min=0)
    distance = places - pixel
    near = F.relu(1 - distance.abs())
    far = F.relu(torch.minimum(1 - (distance - 1).abs(), last))

    weights = attention_weights_of(logits).flatten(2)  # (B, Q, samples)
    upper, lower = weights * near[1], weights * far[1]
    shares = [upper * near[0], upper * far[0], lower * near[0], lower * far[0]]

    counts = sizes.prod(-1)
    starts = torch.matmul((counts.cumsum(0) - counts)[None], spread)  # first token of the level: exact below 2^24
    row = (pixel[1] * size[0] + pixel[0] + starts).int()
    right, down = last.clamp(max=1).int().unbind()
    down = down * size[0].int()
    rows = [row, row + right, row + down, row + (down + right)]
    shape = (batch, queries, heads, levels * points)
    return tuple(torch.stack([x.view(shape) for x in xs], dim=-2).flatten(-2) for xs in (rows, shares))
