"""Find what an evaluation left: detections, their annotations and images, and what is known about the run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from dino_d2.data import CocoFiles
from dino_d2.engine.run_folder import CONFIG, EVALUATION
from dino_d2.evaluation.build import evaluator_type
from dino_d2.evaluation.coco import DETECTIONS
from dino_d2.evaluation.record import read_record

from .curves import Curve, read_curves

MAX_DETS = 100  # of detectron2's own models and of files, unless the user says otherwise
NOT_RECORDED = "not recorded"


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
    notes: sentences on what could not be found.
    datasets: all that the run was evaluated on, this one first.
    """

    title: str
    files: CocoFiles
    detections: Path
    max_dets: int
    about: dict[str, str]
    queries: dict[str, float] | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def find_evaluated(run: Path, files: CocoFiles | None = None, dataset: str | None = None) -> Evaluated:
    """Find an evaluation.

    Args:
        run: OUTPUT_DIR of an evaluated run, or a file of detections in COCO's results format.
        files: annotations and images; by default those that the run's config names.
        dataset: its name in the run's config, if there are several.

    Raises:
        FileNotFoundError: there is no evaluation.
        ValueError: a file of detections without `files`; a dataset that has no detections.
    """
    if run.is_file():
        if files is None:
            raise ValueError(f"{run} is a file of detections: give --val-json FILE and --val-images FOLDER, too")
        return Evaluated(run.stem, files, run, MAX_DETS, {})
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist; RUN is the OUTPUT_DIR of an evaluated run or a JSON file")
    record = read_record(run / EVALUATION)
    cfg = CfgNode.load_cfg(record["config"]) if record else _config_of(run)
    found = _datasets_evaluated(run, cfg)
    if dataset is not None and dataset not in found:
        raise ValueError(f"{run} has no detections on {dataset}, but on {', '.join(found)}")
    name = dataset or next(iter(found))
    metrics = record.get("metrics", {})
    curves, notes = _curves_of(run, name)
    return Evaluated(
        title=str(run),
        files=files or files_of(cfg, name),
        detections=found[name],
        max_dets=cfg.TEST.get("MAX_DETS_PER_IMAGE", MAX_DETS),
        about={
            "dataset": name,
            "weights": record.get("weights", NOT_RECORDED),
            "config": f"SHA-256 {hashlib.sha256(cfg.dump().encode()).hexdigest()[:12]}…",
            **{key: record[key] for key in ("machine", "versions") if record},
        },
        queries=metrics.get(name, metrics).get("queries"),
        curves=curves,
        notes=notes,
        datasets=(name, *(other for other in found if other != name)),
    )


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
        raise ValueError(f"no annotations and images are known for {name}: give --val-json and --val-images")
    return CocoFiles(Path(metadata.json_file), Path(metadata.image_root))


def _config_of(run: Path) -> CfgNode:
    """The config of a run whose evaluation has no record: the training run's, else that of an evaluation alone."""
    files = [file for file in (run / CONFIG, run / EVALUATION / CONFIG) if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{run} has no {CONFIG}: RUN must be the OUTPUT_DIR of an evaluated run, or a file of detections with "
            "--val-json and --val-images"
        )
    return CfgNode.load_cfg(files[0].read_text())


def _datasets_evaluated(run: Path, cfg: CfgNode) -> dict[str, Path]:
    """The file of detections of each dataset in `DATASETS.TEST` that has one."""
    files = {name: run / EVALUATION / name / DETECTIONS for name in cfg.DATASETS.TEST}
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


def _curves_of(run: Path, dataset: str) -> tuple[dict[str, Curve], tuple[str, ...]]:
    """The curves of the training run, and a note if they cannot be read."""
    if not (run / "metrics.json").is_file():
        return {}, ()
    try:
        return read_curves(run, dataset), ()
    except ValueError as error:  # of a run that was killed while it wrote
        return {}, (f"Training curves: {error}.",)
