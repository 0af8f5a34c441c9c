"""Load the compiled kernels, or explain why they are not available."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import warnings
from collections.abc import Sequence

import torch

try:
    importlib.import_module("._C", __package__)  # registers torch.ops.dino_d2
except ImportError as error:
    _import_error: str | None = str(error)
else:
    _import_error = None

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_available: dict[str, bool] = {}  # by device type, filled on demand because querying a GPU initialises its driver

_REMEDY = (
    "Build it with `make setup`, or in your own environment with `pip install --no-build-isolation -e .`; "
    f"both need a C++ compiler and torch >= 2.10 (installed: {torch.__version__})."
)


# Constant for tracing: the available kernels do not change within a process.
@torch.compiler.assume_constant_result
def compiled(device_type: str = "cpu") -> bool:
    """Whether kernels for a device type ("cpu", "cuda") are loaded and support every visible GPU.

    Without a GPU: whether such kernels were built.
    """
    if device_type not in _available:
        _available[device_type] = _missing_reason(device_type) is None
    return _available[device_type]


def require_compiled(device_type: str = "cpu") -> None:
    """Raise ImportError with reason and remedy, unless :func:`compiled`."""
    if not compiled(device_type):
        raise ImportError(f"dino_d2's compiled op is not available: {_missing_reason(device_type)}. {_REMEDY}")


@torch.compiler.assume_constant_result
def warn_about_fallback(device_type: str) -> None:
    """Warn once that the slow fallback is used, why, and how to fix it."""
    _warn_once(device_type)


@functools.cache
def _warn_once(device_type: str) -> None:
    warnings.warn(
        f"dino_d2's compiled op is not available: {_missing_reason(device_type)}; using plain PyTorch instead, with "
        f"the same results but many times slower. {_REMEDY}",
        stacklevel=4,  # points to the caller of the op
    )


def _missing_reason(device_type: str) -> str | None:
    if _import_error is not None:
        return f"it could not be loaded ({_import_error})"
    key = _DISPATCH_KEYS.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("dino_d2::ms_deform_attn", key):
        return f"it was built without kernels for {device_type}"
    return _unsupported_gpus() if device_type == "cuda" else None


def _unsupported_gpus() -> str | None:
    code, gpus = _code(), _gpus()
    unsupported = {name: capability for name, capability in gpus if not has_code_for(code, capability)}
    if not unsupported:
        return None
    wanted = shlex.quote(";".join(f"{major}.{minor}" for major, minor in sorted({present for _, present in gpus})))
    which = ", ".join(f"{name} (compute capability {major}.{minor})" for name, (major, minor) in unsupported.items())
    command = f"TORCH_CUDA_ARCH_LIST={wanted} pip install --no-build-isolation -e ."
    return f"it was built for {', '.join(code)}, not for {which}; build it for these GPUs: `{command}`"


def _code() -> list[str]:
    """Architectures in the binary: sm_80 (machine code), compute_90 (PTX), …"""
    return torch.ops.dino_d2.accelerator_architectures().split("+")


def _gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of every visible GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


def has_code_for(code: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU can run any of the code, by CUDA's compatibility rules.

    Machine code runs on the same and later minor versions of its major version, PTX on all later versions; with the
    suffix a only on exactly that version, with f on later minor versions.

    Args:
        code: nvcc's names: sm_86, sm_90a, compute_90, compute_100f, …
        capability: (major, minor) of the GPU.
    """
    return any(_runs_on(name, capability) for name in code)


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name).groups()
    own = int(number[:-1]), int(number[-1])
    if suffix == "a":
        return capability == own
    same_major = capability[0] == own[0]
    return capability >= own and (same_major or (kind == "compute" and not suffix))
