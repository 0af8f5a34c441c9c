"""Sine embeddings of pixels (encoder) and anchors (decoder)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ANCHOR_TEMPERATURE = 10000


def _interleaved_sine(angles: Tensor) -> Tensor:
    """Sine of even entries, cosine of odd entries: (..., n) -> (..., n)."""
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def _frequencies(count: int, temperature: float, like: Tensor) -> Tensor:
    """(count,) wavelengths in radians, each used for a sine and a cosine."""
    index = torch.arange(count, dtype=like.dtype, device=like.device)
    return temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / count)


def pixel_embedding(
    padding_mask: Tensor, channels: int, temperature: float, offset: float, dtype: torch.dtype
) -> Tensor:
    """Sine embedding of pixel positions, relative to the unpadded image.

    Args:
        padding_mask: (B, h, w) bool, True on padding.
        channels: a multiple of 4; the first half describes y, the second x.
        temperature: longest wavelength divided by 2 pi (20 in DINO, 10000 in DETR).
        offset: added to pixel indices, which start at 1, before dividing by the image size.

    Returns:
        (B, channels, h, w) of `dtype`.
    """
    inside = (~padding_mask).to(dtype)

    def embed(dim: int) -> Tensor:
        count = inside.cumsum(dim)
        last = count.select(dim, -1).unsqueeze(dim)
        position = (count + offset) / (last + 1e-6) * 2 * math.pi
        return _interleaved_sine(position[..., None] / _frequencies(channels // 2, temperature, position))

    return torch.cat([embed(1), embed(2)], dim=-1).permute(0, 3, 1, 2)


def anchor_embedding(anchors: Tensor, channels: int) -> Tensor:
    """Sine embedding of boxes (DAB-DETR, arXiv 2201.12329, section 4.2).

    Args:
        anchors: (..., 4) cx, cy, w, h.
        channels: per coordinate, even.

    Returns:
        (..., 4 * channels) in the order y, x, w, h.
    """
    angles = anchors[..., None] * 2 * math.pi / _frequencies(channels, ANCHOR_TEMPERATURE, anchors)
    x, y, w, h = _interleaved_sine(angles).unbind(-2)
    return torch.cat([y, x, w, h], dim=-1)
