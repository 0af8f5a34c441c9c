"""Building blocks shared by several modules, and helpers that save memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .int8 import QuantizableLinear

# Rows per chunk: their hidden channels (2048 float32 values each: 16 MB) fit into CPU caches.
CHUNK_ROWS = 2048


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU in between: (..., input_dim) -> (..., output_dim)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        sizes = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Two linear layers with ReLU, then residual and LayerNorm: (..., embed_dim) -> (..., embed_dim)."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.linear1 = QuantizableLinear(embed_dim, hidden_dim)
        self.linear2 = QuantizableLinear(hidden_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return apply_in_chunks(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(relu(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


def relu(x: Tensor) -> Tensor:
    """ReLU, in place without gradients (the output of a linear layer is a view, which makes in-place autograd slow)."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def box_head(embed_dim: int) -> MLP:
    """Three-layer MLP that predicts the 4 logit-space offsets of a box, initialised to 0."""
    head = MLP(embed_dim, embed_dim, 4, num_layers=3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


def maybe_checkpoint(module: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`module(*inputs)`, with activation checkpointing if `recompute` is True."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def apply_in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` for a function that handles each row of `x` (..., C) independently and keeps the shape.

    On a CPU without gradients it is applied to chunks of rows, so that intermediate results stay in the caches.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    rows = x.flatten(0, -2)
    result = torch.empty_like(rows)
    for chunk, output in zip(rows.split(CHUNK_ROWS), result.split(CHUNK_ROWS), strict=True):
        output.copy_(function(chunk))
    return result.view(x.shape)
