"""Memory fusion of Stable-DINO (arXiv 2304.04742): combine the outputs of all encoder layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dino_d2.modeling.encoder import DeformableEncoder
from dino_d2.modeling.layers import maybe_checkpoint
from dino_d2.structures import Memory


class FusingEncoder(DeformableEncoder):
    """Returns LayerNorm(Linear([x0, …, xL])), where x0 is the input of the encoder and xi the output of layer i.

    Arguments: :class:`DeformableEncoder`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        embed_dim = self.level_embed.shape[1]
        self.fusion = nn.Sequential(nn.Linear((len(self.layers) + 1) * embed_dim, embed_dim), nn.LayerNorm(embed_dim))
        nn.init.xavier_uniform_(self.fusion[0].weight)

    def refine(self, memory: Memory, position: Tensor, reference: Tensor) -> Memory:
        tokens = [memory.tokens]
        for layer in self.layers:
            memory = maybe_checkpoint(layer, memory, position, reference, recompute=self.recompute)
            tokens.append(memory.tokens)
        return replace(memory, tokens=self.fusion(torch.cat(tokens, dim=-1)))
