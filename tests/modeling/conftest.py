"""Small memories for the modules that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from dino_d2.structures import Memory


def _make_memory(
    spatial_shapes: Sequence[tuple[int, int]] = ((8, 6), (4, 3)),
    channels: int = 32,
    valid: Sequence[tuple[float, float]] = ((1.0, 1.0), (0.5, 2 / 3)),
    dtype: torch.dtype = torch.float64,
) -> Memory:
    masks, sizes = [], []
    for share_y, share_x in valid:
        levels = []
        for height, width in spatial_shapes:
            level = torch.ones(height, width, dtype=torch.bool)
            rows, columns = round(height * share_y), round(width * share_x)
            level[:rows, :columns] = False
            levels.append(level.flatten())
            sizes.append((columns, rows))
        masks.append(torch.cat(levels))
    return Memory(
        tokens=torch.randn(len(valid), len(masks[0]), channels, dtype=dtype),
        padding_mask=torch.stack(masks),
        spatial_shapes=tuple(spatial_shapes),
        valid_sizes=torch.tensor(sizes, dtype=dtype).view(len(valid), len(spatial_shapes), 2),
    )


@pytest.fixture(scope="session")
def make_memory() -> Callable[..., Memory]:
    """Random tokens; `valid` is the unpadded (height, width) share of each image."""
    return _make_memory
