"""Checkpoint files: read them without running their code, write them atomically."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

# Globals in a pickle of NumPy arrays in plain containers (detectron2's model zoo).
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
            raise pickle.UnpicklingError(f"unsupported GLOBAL {module}.{name}")  # as torch says it
        return super().find_class(module, name)


def check_arrays_only(path: str | Path) -> None:
    """Check that a .pkl file holds only arrays, without running anything else.

    Raises:
        pickle.UnpicklingError: it holds anything else, which the message names as "GLOBAL …"; or it is damaged.
    """
    with open(path, "rb") as file:
        _ArraysOnly(file, encoding="latin1").load()


# Globals in a pickle of tensors in containers; torch resolves storages itself.
TENSORS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class _Inert:
    """Replaces objects of any class not needed for tensors: accepts everything and does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __call__(self, *args: object, **kwargs: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    append = extend = add = __setstate__


class _TensorsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in TENSORS:
            return _Inert
        found = super().find_class(module, name)
        return found if isinstance(found, type) else lambda *args: found(*args)  # a file can set attributes on it


def _load_tensors(file: IO[bytes], **kwargs: Any) -> Any:
    return _TensorsOnly(file, **kwargs).load()


# A `pickle_module` for torch.load.
TENSORS_ONLY = SimpleNamespace(__name__=__name__, Unpickler=_TensorsOnly, load=_load_tensors)


@dataclass(frozen=True)
class PublishedFile:
    """The used part of a checkpoint from another code base.

    state: parameters and buffers under their original names.
    config: text of the config that MMDetection stores in its files, or empty.
    """

    state: dict[str, Tensor]
    config: str


def read_published(path: str | Path) -> PublishedFile:
    """Read a checkpoint without running or importing anything named in it.

    Supports {"model": …} (official code, detectron2, detrex), {"ema_state": …} (detrex's moving average, which
    replaces "model"), {"state_dict": …} (MMDetection) and a bare state dict. The prefix `module.` of data parallelism
    is removed.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is damaged or holds something else.
    """
    content = _read_tensors(path)
    content = content if isinstance(content, dict) else {}
    parts = {key: _tensors(content.get(key)) for key in ("model", "ema_state", "state_dict")}
    state = _averaged(parts["model"], parts["ema_state"]) or parts["state_dict"] or _tensors(content)
    if not state:
        raise ValueError(
            f"{path} is not a checkpoint: it has no state dict, also not under 'model', 'ema_state' or 'state_dict'"
        )
    meta = content.get("meta")
    config = meta.get("cfg", meta.get("config")) if isinstance(meta, dict) else None
    return PublishedFile(state, config if isinstance(config, str) else "")


def _read_tensors(path: str | Path) -> Any:
    """Load a file, replacing everything but tensors, containers, strings and numbers by inert objects."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not relevant here
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:  # more than tensors
                return torch.load(path, map_location="cpu", weights_only=False, pickle_module=TENSORS_ONLY)
    except OSError:
        raise
    except Exception as error:  # unpickling can raise anything
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error


def _tensors(content: object) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, dict) else ()
    return {
        name.removeprefix("module."): value
        for name, value in items
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _averaged(model: dict[str, Tensor], average: dict[str, Tensor]) -> dict[str, Tensor]:
    """`model` with its values replaced by the moving average, which lists shared tensors under one name only."""
    if not average:
        return model
    renamed = {_storage(model[name]): value for name, value in average.items() if name in model}
    return {name: renamed.get(_storage(value), value) for name, value in model.items()} | average


def _storage(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def write_checkpoint(content: dict, folder: str | Path, name: str) -> None:
    """Write `folder`/`name` atomically; see :func:`write_atomically`."""
    write_atomically(folder, name, lambda file: torch.save(content, file))


def write_atomically(folder: str | Path, name: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write to a temporary file, then rename it.

    Remote paths (`PREFIX://`) are written through iopath, as elsewhere in detectron2.

    Raises:
        OSError: writing failed; an existing file is unchanged.
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
        raise OSError(f"could not write {path} ({free:.0f} MiB free in its folder): {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def average_of(path: str | Path) -> dict[str, Tensor]:
    """The moving average of the weights in a training checkpoint.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the checkpoint has none, or the file is damaged.
    """
    state = _read_tensors(path)
    for key in ("trainer", "hooks", "EMA"):
        state = state.get(key) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} has no moving average: only checkpoints of runs with SOLVER.EMA.ENABLED True do, except "
            "model_best.pth and model_final_ema.pth, which are plain weights already"
        )
    return {name.removeprefix("module."): value for name, value in state.items() if name.startswith("module.")}
