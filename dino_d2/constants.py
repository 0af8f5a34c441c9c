"""Cache tensors that depend only on shapes, so that they are not recomputed at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

CACHE_SIZE = 4  # entries; a position embedding takes 23 MB at 800 x 1333


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache the last results of a function of numbers, dtypes and devices. Results must not be modified in place.

    While a graph is compiled or traced, and in a dispatch mode, the function itself is called: shapes may be symbolic,
    the compiler folds constants, and tensors made in a mode such as `FakeTensorMode` are of no use outside of it.
    """

    @lru_cache(CACHE_SIZE)
    def cached(*args: object) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # usable in training even if first called in inference mode
            return make(*args)

    @wraps(make)
    def wrapper(*args: object) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
            return make(*args)
        return cached(*args)

    return wrapper
