"""Loads the compiled kernels, if they are there, and says why if they are not."""

from __future__ import annotations

import functools
import warnings

try:
    from . import _C  # noqa: F401  (importing it registers torch.ops.dino_d2)
except ImportError as error:
    _why_not: str | None = str(error)
else:
    _why_not = None

_REMEDY = (
    "Build it with `make setup`, or in your own environment with `pip install --no-build-isolation -e .`; "
    "both need a C++ compiler and torch >= 2.10."
)


def compiled() -> bool:
    """Whether the compiled kernels were loaded."""
    return _why_not is None


def require_compiled() -> None:
    """Raise ImportError, with the reason and the remedy, unless the compiled kernels were loaded."""
    if not compiled():
        raise ImportError(f"dino_d2's compiled op could not be loaded ({_why_not}). {_REMEDY}")


@functools.cache
def warn_that_reference_serves() -> None:
    """Say once that the slow path is taken, why, and how to get the fast one."""
    warnings.warn(
        f"dino_d2's compiled op could not be loaded ({_why_not}); the plain PyTorch formulation is used instead: "
        f"the same results, many times slower. {_REMEDY}",
        stacklevel=3,
    )
