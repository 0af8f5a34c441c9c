"""Checkpoint files: reading them without running what is in them, writing them whole or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor


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
    """Write `folder`/`name` whole or not at all: under another name first, which then takes this one's place.

    Raises:
        OSError: nothing could be written; what was there is untouched.
    """
    path = Path(folder, name)
    temporary = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{path} could not be written ({free:.0f} MiB free in its folder): {error}") from error


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's, which never leaves half a file, and says what to do about one."""

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        write_checkpoint({"model": self.model.state_dict(), **parts, **kwargs}, self.save_dir, f"{name}.pth")
        self.logger.info("Saved %s", Path(self.save_dir, f"{name}.pth"))
        self.tag_last_checkpoint(f"{name}.pth")

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            self._parsed_url_during_load = None  # or the next load would fail
            others = sorted(Path(filename).parent.glob("model_*.pth"), key=lambda path: path.stat().st_mtime)
            earlier = [str(path) for path in others if path != Path(filename) and not path.stem.endswith("_ema")]
            advice = f"To go on from the one before: --resume-from {earlier[-1]}" if earlier else "There is no other."
            raise ValueError(f"{filename} is damaged or no checkpoint ({error}). {advice}") from error
