"""The two small blocks that several modules are made of, and how a function is called to take less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Rows that are worked on at a time: their hidden channels (2048 of float32: 16 MB) fit the caches of a CPU.
ROWS_AT_A_TIME = 2048


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them: (..., input_dim) -> (..., output_dim)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        sizes = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Two linear layers with ReLU, residual and LayerNorm after it: (..., embed_dim) -> the same."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(relu(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


def relu(x: Tensor) -> Tensor:
    """ReLU, in place where no gradient is wanted (the product of a linear layer is a view: a gradient would pay)."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def box_head(embed_dim: int) -> MLP:
    """Three layers to the 4 logit-space numbers of a box; starts as "do not move"."""
    head = MLP(embed_dim, embed_dim, 4, num_layers=3)
    nn.init.zeros_(head.layers[-1].weight)
    nn.init.zeros_(head.layers[-1].bias)
    return head


def call(module: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`module(*inputs)`; with `recompute` its activations are not kept but made again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` for a function that treats each row of `x` (..., C) by itself and keeps the shape.

    On a CPU that keeps no activations it is given some rows at a time, so that what it makes on the way stays in the
    caches instead of being written to memory and read again.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    rows = x.flatten(0, -2)
    result = torch.empty_like(rows)
    for part, place in zip(rows.split(ROWS_AT_A_TIME), result.split(ROWS_AT_A_TIME), strict=True):
        place.copy_(function(part))
    return result.view(x.shape)
