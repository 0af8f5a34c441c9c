"""Random numbers that depend only on the position in a run, for exact resuming."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_from(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators from a key of non-negative integers."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state)


@contextmanager
def own_random_numbers(*key: int) -> Iterator[None]:
    """Inside, generators are seeded as by `seed_from(*key)`; afterwards the previous CPU states are restored."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_from(*key)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
