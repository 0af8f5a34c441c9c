"""Checkpoint files: reading them without running what is in them, writing them whole or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

# What a pickle of NumPy arrays in plain containers is made of (detectron2's model zoo).
ARRAYS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def check_arrays_only(path: str | Path) -> None:
    """Read a .pkl file without running anything but the making of arrays.

    Raises:
        pickle.UnpicklingError: it holds anything else, which is named.
    """
    with open(path, "rb") as file:
        _ArraysOnly(file, encoding="latin1").load()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint, under the names it has, without the `module.` of data parallelism.

    Understands {"model": …} (published program, detectron2, detrex), {"state_dict": …} (MMDetection) and a bare
    state dict. Published files also hold an `argparse.Namespace`; no other class is allowed to be made.

    Raises:
        ValueError: the file holds something else, or objects that could run code when loaded.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than weights, which is not loaded: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} is no checkpoint: neither a state dict nor one under 'model' or 'state_dict'")
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def write_checkpoint(content: dict, folder: str | Path, name: str) -> None:
    """Write `folder`/`name` whole or not at all; see :func:`write_whole`."""
    write_whole(folder, name, lambda file: torch.save(content, file))


def write_whole(folder: str | Path, name: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under another name first, which then takes this one's place.

    Paths of other storage (`PREFIX://`) are written by iopath's handler for them, as everywhere in detectron2.

    Raises:
        OSError: nothing could be written; what was there is untouched.
    """
    if "://" in str(folder):
        with tempfile.TemporaryFile() as whole:
            write(whole)
            whole.seek(0)
            with PathManager.open(os.path.join(folder, name), "wb") as file:
                shutil.copyfileobj(whole, file)
        return
    path = Path(folder, name)
    temporary = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{path} could not be written ({free:.0f} MiB free in its folder): {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def average_of(path: str | Path) -> dict[str, Tensor]:
    """The moving average of the weights in a checkpoint that training wrote.

    Raises:
        ValueError: there is none in it.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("trainer", {}).get("hooks", {}).get("EMA") if isinstance(content, dict) else None
    if state is None:
        raise ValueError(
            f"{path} holds no moving average: checkpoints of a training with SOLVER.EMA.ENABLED True do, but for "
            "model_best.pth and model_final_ema.pth, which are weights already"
        )
    return {name.removeprefix("module."): value for name, value in state.items() if name.startswith("module.")}
