"""Tensors that depend on nothing but shapes: made once for each, not at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor

SHAPES = 4  # the last so many are kept; a position embedding takes 23 MB at 800 x 1333


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep the last results of a function of numbers, dtypes and devices. Nobody may change them in place.

    While a graph is being recorded the function itself is called: its shapes may be symbols, and the graph's compiler
    knows a constant when it sees one.
    """

    @lru_cache(SHAPES)
    def kept(*args: object) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # usable in training, wherever it was first asked for
            return make(*args)

    @wraps(make)
    def wrapper(*args: object) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return make(*args)
        return kept(*args)

    return wrapper
