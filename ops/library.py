"""Loads the compiled kernels, if they are there, and says why if they are not."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

try:
    importlib.import_module("._C", __package__)  # registers torch.ops.dino_d2
except ImportError as error:
    _why_not: str | None = str(error)
else:
    _why_not = None

# Found once, so that a trace of the model sees constants.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_SERVED = frozenset(
    device_type
    for device_type, key in _DISPATCH_KEYS.items()
    if _why_not is None and torch._C._dispatch_has_kernel_for_dispatch_key("dino_d2::ms_deform_attn", key)
)

_REMEDY = (
    "Build it with `make setup`, or in your own environment with `pip install --no-build-isolation -e .`; "
    f"both need a C++ compiler and torch >= 2.10 (this one is {torch.__version__})."
)


def compiled(device_type: str = "cpu") -> bool:
    """Whether kernels for that type of device ("cpu", "cuda") were loaded."""
    return device_type in _SERVED


def require_compiled(device_type: str = "cpu") -> None:
    """Raise ImportError, with the reason and the remedy, unless kernels for that type of device were loaded."""
    if not compiled(device_type):
        raise ImportError(f"dino_d2's compiled op cannot serve: {_why_not_for(device_type)}. {_REMEDY}")


@functools.cache
def warn_that_reference_serves(device_type: str) -> None:
    """Say once that the slow path is taken, why, and how to get the fast one."""
    warnings.warn(
        f"dino_d2's compiled op cannot serve: {_why_not_for(device_type)}; the plain PyTorch formulation is used "
        f"instead: the same results, many times slower. {_REMEDY}",
        stacklevel=3,
    )


def _why_not_for(device_type: str) -> str:
    if _why_not is not None:
        return f"it could not be loaded ({_why_not})"
    return f"it was built without kernels for {device_type}"
