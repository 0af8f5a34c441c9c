"""Find what an evaluation left: detections, their annotations and images, and what is known about the run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from dino_d2.data import CocoFiles
from dino_d2.engine.run_folder import CONFIG, EVALUATION, RESULTS
from dino_d2.evaluation.build import evaluator_type

from .curves import Curve, read_curves

DETECTIONS = "coco_instances_results.json"  # written by detectron2's COCOEvaluator
METRICS = "metrics.json"
PACKAGES = ("dino_d2", "torch", "detectron2", "hotcoco", "pycocotools")
QUERIES = "queries/"  # prefix of the metrics of TEST.QUERY_METRICS


@dataclass(frozen=True)
class Evaluated:
    """An evaluation on one dataset.

    title: of the report.
    files: annotations and images.
    detections: file in COCO's results format.
    max_dets: detections per image and class that count.
    about: label -> text.
    queries: metrics of `TEST.QUERY_METRICS`; None if not measured.
    curves: of the training run in the same folder; empty without one.
    """

    title: str
    files: CocoFiles
    detections: Path
    max_dets: int
    about: dict[str, str]
    queries: dict[str, float] | None = None
    curves: dict[str, Curve] | None = None


def find_evaluated(run: Path, files: CocoFiles | None = None, dataset: str | None = None) -> Evaluated:
    """Find an evaluation.

    Args:
        run: OUTPUT_DIR of an evaluated run, or a file of detections in COCO's results format.
        files: annotations and images; by default those that the run's config names.
        dataset: its name in the run's config, if there are several.

    Raises:
        FileNotFoundError: there is no evaluation, or no annotation file.
        ValueError: a file of detections without `files`; a dataset that has no detections.
    """
    if run.is_file():
        if files is None:
            raise ValueError(f"{run} is a file of detections: give --annotations FILE and --images FOLDER, too")
        return Evaluated(run.stem, files, run, 100, _versions())
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist; RUN is the OUTPUT_DIR of an evaluated run or a JSON file")
    cfg = _config_of(run)
    evaluated = _datasets_evaluated(run, cfg)
    if dataset is not None and dataset not in evaluated:
        raise ValueError(f"{run} has no detections on {dataset}, but on {', '.join(evaluated)}")
    name = dataset or next(iter(evaluated))
    recorded = _recorded(run, evaluated[name])
    metrics = recorded.get("metrics", {})
    has_curves = (run / METRICS).is_file()
    return Evaluated(
        title=str(run),
        files=files or files_of(cfg, name),
        detections=evaluated[name],
        max_dets=cfg.TEST.get("MAX_DETS_PER_IMAGE", 100),  # detectron2's own models lack the key
        about={
            "dataset": name,
            "weights": recorded.get("weights", "not recorded"),
            "config": f"SHA-256 {hashlib.sha256(cfg.dump().encode()).hexdigest()[:12]}…",
            **_versions(),
        },
        queries=metrics.get(name, metrics).get("queries") or (_last_queries(run / METRICS) if has_curves else None),
        curves=read_curves(run) if has_curves else None,
    )


def detections_file(folder: Path, name: str) -> Path:
    """Where `DINOTrainer` writes the detections on the dataset `name`, in the OUTPUT_DIR `folder`."""
    return folder / EVALUATION / name / DETECTIONS


def files_of(cfg: CfgNode, name: str) -> CocoFiles:
    """Annotations and images of a dataset in the config or registered with detectron2.

    Raises:
        ValueError: they are unknown, or it is not evaluated as COCO.
    """
    own = {entry[0]: CocoFiles(Path(entry[1]), Path(entry[2])) for entry in cfg.DATASETS.get("COCO_FORMAT", [])}
    if name in own:
        return own[name]
    if evaluator_type(name) != "coco":
        raise ValueError(f"{name} is not evaluated as COCO, so its detections cannot be reported")
    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file") or metadata.get("image_root") is None:
        raise ValueError(f"no annotations and images are known for {name}: give --annotations and --images")
    return CocoFiles(Path(metadata.json_file), Path(metadata.image_root))


def _config_of(run: Path) -> CfgNode:
    """The config of the last evaluation in the folder: that of `--eval-only`, else that of the training run."""
    files = [file for file in (run / EVALUATION / CONFIG, run / CONFIG) if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{run} has no {CONFIG}: RUN must be the OUTPUT_DIR of an evaluated run, or a file of detections with "
            "--annotations and --images"
        )
    return CfgNode.load_cfg(files[0].read_text())


def _datasets_evaluated(run: Path, cfg: CfgNode) -> dict[str, Path]:
    """The file of detections of each dataset in `DATASETS.TEST` that has one."""
    files = {name: detections_file(run, name) for name in cfg.DATASETS.TEST}
    if len(files) == 1:  # detectron2's own train_net.py has no folder for each dataset
        (name,) = files
        files = files if files[name].is_file() else {name: run / EVALUATION / DETECTIONS}
    found = {name: file for name, file in files.items() if file.is_file()}
    if not found:
        raise FileNotFoundError(
            f"{run} holds no detections ({EVALUATION}/…/{DETECTIONS}): evaluate it first, with dino-d2 evaluate "
            f"--weights {run} --output {run}"
        )
    return found


def _recorded(run: Path, detections: Path) -> dict[str, Any]:
    """What the evaluation recorded with its detections; empty if it did not, as in the middle of a training run."""
    file = run / EVALUATION / RESULTS
    if not file.is_file() or file.stat().st_mtime < detections.stat().st_mtime:
        return {}
    return json.loads(file.read_text())


def _last_queries(metrics: Path) -> dict[str, float] | None:
    """The query metrics that a training run recorded last."""
    for line in reversed(metrics.read_text().splitlines()):
        values = json.loads(line)
        found = {key.removeprefix(QUERIES): value for key, value in values.items() if key.startswith(QUERIES)}
        if found:
            return found
    return None


def _versions() -> dict[str, str]:
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {_accelerator()}",
        "versions": ", ".join(versions),
    }


def _accelerator() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "no GPU"
