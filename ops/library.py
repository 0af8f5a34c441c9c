"""Loads the compiled kernels, if they are there, and says why if they are not."""

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
    _why_not: str | None = str(error)
else:
    _why_not = None

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_served: dict[str, bool] = {}  # by type of device, found when first asked for: looking at a card starts its driver

_REMEDY = (
    "Build it with `make setup`, or in your own environment with `pip install --no-build-isolation -e .`; "
    f"both need a C++ compiler and torch >= 2.10 (this one is {torch.__version__})."
)


# For the trace of a model both are constants: which devices are served does not change while a process runs.
@torch.compiler.assume_constant_result
def compiled(device_type: str = "cpu") -> bool:
    """Whether kernels for that type of device ("cpu", "cuda") were loaded and run on every card that is there.

    Where there is no card it says whether such kernels were built at all.
    """
    if device_type not in _served:
        _served[device_type] = _why_not_for(device_type) is None
    return _served[device_type]


def require_compiled(device_type: str = "cpu") -> None:
    """Raise ImportError, with the reason and the remedy, unless :func:`compiled`."""
    if not compiled(device_type):
        raise ImportError(f"dino_d2's compiled op cannot serve: {_why_not_for(device_type)}. {_REMEDY}")


@torch.compiler.assume_constant_result
def warn_that_reference_serves(device_type: str) -> None:
    """Say once that the slow path is taken, why, and how to get the fast one."""
    _warn_once(device_type)


@functools.cache
def _warn_once(device_type: str) -> None:
    warnings.warn(
        f"dino_d2's compiled op cannot serve: {_why_not_for(device_type)}; the plain PyTorch formulation is used "
        f"instead: the same results, many times slower. {_REMEDY}",
        stacklevel=4,  # of this function, its caller and the op: where the op was called
    )


def _why_not_for(device_type: str) -> str | None:
    if _why_not is not None:
        return f"it could not be loaded ({_why_not})"
    key = _DISPATCH_KEYS.get(device_type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("dino_d2::ms_deform_attn", key):
        return f"it was built without kernels for {device_type}"
    return _unserved_cards() if device_type == "cuda" else None


def _unserved_cards() -> str | None:
    code, cards = _code(), _cards()
    unserved = {name: capability for name, capability in cards if not has_code_for(code, capability)}
    if not unserved:
        return None
    wanted = shlex.quote(";".join(f"{major}.{minor}" for major, minor in sorted({present for _, present in cards})))
    which = ", ".join(f"{name} (compute capability {major}.{minor})" for name, (major, minor) in unserved.items())
    command = f"TORCH_CUDA_ARCH_LIST={wanted} pip install --no-build-isolation -e ."
    return f"it was built for {', '.join(code)}, not for {which}; build for what is there: `{command}`"


def _code() -> list[str]:
    """What the binary holds: sm_80 (machine code), compute_90 (portable code), …"""
    return torch.ops.dino_d2.accelerator_architectures().split("+")


def _cards() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of every visible card."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]


def has_code_for(code: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a card can run any of it, by the rules of CUDA's compatibility.

    Machine code runs on its own and on later minor versions of one major version, portable code on everything later;
    with the suffix a on exactly that card, with f on later minor versions.

    Args:
        code: as nvcc names it: sm_86, sm_90a, compute_90, compute_100f, …
        capability: (major, minor) of the card.
    """
    return any(_runs_on(name, capability) for name in code)


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name).groups()
    own = int(number[:-1]), int(number[-1])
    if suffix == "a":
        return capability == own
    same_major = capability[0] == own[0]
    return capability >= own and (same_major or (kind == "compute" and not suffix))
