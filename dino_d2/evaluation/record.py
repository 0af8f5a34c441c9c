"""What an evaluation leaves beside its detections: metrics, the weights they are of, the config and the machine."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from dino_d2.digest import sha256_of

from .coco import DETECTIONS

RECORD = "results.json"  # in the folder of evaluations
PACKAGES = ("dino_d2", "torch", "detectron2", "hotcoco", "pycocotools")


def write_record(folder: str, cfg: CfgNode, weights: str, results: Mapping[str, Any]) -> None:
    """Write `results.json`.

    Args:
        folder: of the evaluations, with a folder for each dataset; may be remote.
        weights: that were evaluated; a path or an address.
        results: as returned by detectron2's `test`.
    """
    sizes = {name: size_of(os.path.join(folder, name, DETECTIONS)) for name in cfg.DATASETS.TEST}
    content = {
        "metrics": _plain(results),
        "weights": _with_digest(weights),
        "detections": {name: size for name, size in sizes.items() if size is not None},
        "config": cfg.dump(),
        **machine_and_versions(),
    }
    PathManager.mkdirs(folder)
    with PathManager.open(os.path.join(folder, RECORD), "w") as file:
        json.dump(content, file, indent=1)


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `results.json`; empty if there is none, or if the detections are of a later evaluation, such as
    those in the middle of a training run."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    sizes = {name: size_of(str(folder / name / DETECTIONS)) for name in content["detections"]}
    return content if sizes == content["detections"] else {}


def machine_and_versions() -> dict[str, str]:
    """Two lines of text: "machine" and "versions"."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {gpu}"
    return {"machine": machine, "versions": ", ".join(versions)}


def size_of(file: str) -> int | None:
    """Bytes of a file on this machine; None if there is none."""
    return Path(file).stat().st_size if Path(file).is_file() else None


def _with_digest(weights: str) -> str:
    path = Path(weights)
    if not path.is_file():
        return weights or "none"
    return f"{weights}, SHA-256 {sha256_of(path)[:12]}…"


def _plain(values: Any) -> Any:
    """The same as dictionaries and numbers, with None for NaN, which is not JSON."""
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    number = float(values)
    return number if math.isfinite(number) else None
