"""Update the finest level, three quarters of all tokens, less often than the others (Lite DETR, arXiv 2303.07335), or
never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dino_d2.structures import Memory

from .encoder import EncoderLayer


class InterleavedBlock(nn.Module):
    """Several updates of the coarse levels, then one of the finest; each attends to all levels.

    Used as a layer of :class:`DeformableEncoder` instead of :class:`EncoderLayer`.

    Args:
        coarse: applied in turn to the tokens of all levels but the finest.
        finest: applied to the tokens of the finest level; None: they stay as they are, for the coarse levels, query
            selection and decoder to attend to.
    """

    def __init__(self, coarse: Sequence[EncoderLayer], finest: EncoderLayer | None):
        super().__init__()
        self.coarse = nn.ModuleList(coarse)
        self.finest = finest

    def forward(self, memory: Memory, position: Tensor, reference: Tensor) -> Memory:
        height, width = memory.spatial_shapes[0]
        sizes = [height * width, memory.tokens.shape[1] - height * width]
        fine_tokens, coarse_tokens = memory.tokens.split(sizes, dim=1)
        fine_position, coarse_position = position.split(sizes, dim=1)
        fine_reference, coarse_reference = reference.split(sizes, dim=1)
        for layer in self.coarse:
            coarse_tokens = layer.update(coarse_tokens, coarse_position, coarse_reference, memory)
            memory = replace(memory, tokens=torch.cat([fine_tokens, coarse_tokens], dim=1))
        if self.finest is None:
            return memory
        fine_tokens = self.finest.update(fine_tokens, fine_position, fine_reference, memory)
        return replace(memory, tokens=torch.cat([fine_tokens, coarse_tokens], dim=1))
