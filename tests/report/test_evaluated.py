"""What an evaluation left is found, or what is missing is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from dino_d2.config import add_dino_config
from dino_d2.data import CocoFiles
from dino_d2.engine.run_folder import keep_results
from dino_d2.report.evaluated import find_evaluated

FOUND = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]


@pytest.fixture
def cfg(tmp_path: Path) -> CfgNode:
    """Of a run on two datasets in COCO's format."""
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.DATASETS.COCO_FORMAT = [["first", "first.json", "first"], ["second", "second.json", "second"]]
    cfg.DATASETS.TEST = ("first", "second")
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.TEST.MAX_DETS_PER_IMAGE = 200
    return cfg


def write_run(cfg: CfgNode, *names: str) -> Path:
    """The folder of a run that was evaluated on these datasets."""
    run = Path(cfg.OUTPUT_DIR)
    run.mkdir()
    (run / "config.yaml").write_text(cfg.dump())
    for number, name in enumerate(names, start=1):
        (run / "inference" / name).mkdir(parents=True)
        detections = [entry | {"score": number / 10} for entry in FOUND]
        (run / "inference" / name / "coco_instances_results.json").write_text(json.dumps(detections))
    return run


def test_a_run_has_detections_files_and_limit(cfg: CfgNode) -> None:
    run = write_run(cfg, "first", "second")
    first, second = find_evaluated(run), find_evaluated(run, dataset="second")
    assert first.files == CocoFiles(Path("first.json"), Path("first"))
    assert [json.loads(x.detections.read_text())[0]["score"] for x in (first, second)] == [0.1, 0.2]
    assert (first.title, first.max_dets, second.about["dataset"]) == (str(run), 200, "second")


def test_only_what_was_evaluated_is_found(cfg: CfgNode) -> None:
    run = write_run(cfg, "second")
    assert find_evaluated(run).about["dataset"] == "second"
    with pytest.raises(ValueError, match="no detections on first, but on second"):
        find_evaluated(run, dataset="first")


def test_weights_and_query_metrics_are_those_that_the_evaluation_recorded(cfg: CfgNode, tmp_path: Path) -> None:
    run = write_run(cfg, "first", "second")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"abc")
    results = {"first": {"bbox": {"AP": 1.0}}, "second": {"bbox": {"AP": float("nan")}, "queries": {"ATD100": 12.0}}}
    keep_results(cfg, str(weights), results)
    first, second = find_evaluated(run), find_evaluated(run, dataset="second")
    assert first.about["weights"] == f"{weights}, SHA-256 ba7816bf8f01…"  # of "abc", FIPS 180-2
    assert (first.queries, second.queries) == (None, {"ATD100": 12.0})
    newer = run / "inference" / "second" / "coco_instances_results.json"
    later = (run / "inference" / "results.json").stat().st_mtime + 5
    os.utime(newer, (later, later))  # an evaluation in the middle of another run
    second = find_evaluated(run, dataset="second")
    assert (second.about["weights"], second.queries) == ("not recorded", None)


def test_curves_and_last_query_metrics_of_the_training_run_are_found(cfg: CfgNode) -> None:
    run = write_run(cfg, "first")
    lines = [{"iteration": 9, "total_loss": 3.0, "queries/ATD100": 5.0}, {"iteration": 19, "queries/ATD100": 4.0}]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    found = find_evaluated(run)
    assert found.queries == {"ATD100": 4.0}
    assert found.curves == {"total_loss": {9: 3.0}}


def test_a_run_of_detectron2s_own_tools_is_found(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ("first",)
    del cfg.TEST["MAX_DETS_PER_IMAGE"]
    run = write_run(cfg)
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(FOUND))
    found = find_evaluated(run)
    assert (found.max_dets, found.detections) == (100, run / "inference" / "coco_instances_results.json")


def test_a_file_of_detections_needs_its_annotations(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(FOUND))
    with pytest.raises(ValueError, match="--annotations FILE and --images FOLDER"):
        find_evaluated(file)
    files = CocoFiles(tmp_path / "val.json", tmp_path)
    found = find_evaluated(file, files)
    assert (found.title, found.files, found.detections) == ("found", files, file)


def test_what_is_missing_is_named(cfg: CfgNode, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; RUN is"):
        find_evaluated(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        find_evaluated(tmp_path)
    run = write_run(cfg)
    with pytest.raises(FileNotFoundError, match="evaluate it first"):
        find_evaluated(run)
