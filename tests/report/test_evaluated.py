"""What an evaluation left is found, or what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from dino_d2.config import add_dino_config
from dino_d2.data import CocoFiles
from dino_d2.evaluation.record import write_record
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


def record(cfg: CfgNode, weights: Path, results: dict) -> None:
    write_record(str(Path(cfg.OUTPUT_DIR) / "inference"), cfg, str(weights), results)


def test_weights_and_query_metrics_are_those_that_the_evaluation_recorded(cfg: CfgNode, tmp_path: Path) -> None:
    run = write_run(cfg, "first", "second")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"abc")
    results = {"first": {"bbox": {"AP": 1.0}}, "second": {"bbox": {"AP": float("nan")}, "queries": {"ATD100": 12.0}}}
    record(cfg, weights, results)
    first, second = find_evaluated(run), find_evaluated(run, dataset="second")
    assert first.about["weights"] == f"{weights}, SHA-256 ba7816bf8f01…"  # of "abc", FIPS 180-2
    assert (first.queries, second.queries) == (None, {"ATD100": 12.0})
    assert (first.datasets, second.datasets) == (("first", "second"), ("second", "first"))
    later = run / "inference" / "second" / "coco_instances_results.json"
    later.write_text(json.dumps(2 * FOUND))  # an evaluation in the middle of another run
    second = find_evaluated(run, dataset="second")
    assert (second.about["weights"], second.queries) == ("not recorded", None)


def test_config_is_that_of_the_evaluation_whatever_was_in_the_folder_before(cfg: CfgNode, tmp_path: Path) -> None:
    run = write_run(cfg, "first")
    (run / "inference" / "config.yaml").write_text(cfg.dump())  # evaluated before
    cfg.DATASETS.COCO_FORMAT = [["third", "third.json", "third"]]
    cfg.DATASETS.TEST = ("third",)
    cfg.TEST.MAX_DETS_PER_IMAGE = 30
    (run / "config.yaml").write_text(cfg.dump())
    (run / "inference" / "third").mkdir()
    (run / "inference" / "third" / "coco_instances_results.json").write_text(json.dumps(FOUND))
    unrecorded = find_evaluated(run)
    record(cfg, tmp_path / "none.pth", {"bbox": {"AP": 1.0}})
    for found in (unrecorded, find_evaluated(run)):
        assert (found.about["dataset"], found.max_dets, found.datasets) == ("third", 30, ("third",))


@pytest.mark.parametrize("weights", ["https://example.org/model.pth", "detectron2://model.pkl", ""])
def test_weights_that_are_no_file_are_recorded_by_name(cfg: CfgNode, weights: str) -> None:
    run = write_run(cfg, "first")
    record(cfg, weights, {"bbox": {"AP": 1.0}})
    assert find_evaluated(run).about["weights"] == (weights or "none")


def test_evaluations_without_detections_in_coco_format_are_recorded_too(cfg: CfgNode) -> None:
    record(cfg, "weights.pth", {"bbox": {"AP": 3.0}})  # Pascal VOC writes no folder
    content = json.loads((Path(cfg.OUTPUT_DIR) / "inference" / "results.json").read_text())
    assert (content["metrics"], content["detections"]) == ({"bbox": {"AP": 3.0}}, {})


def test_curves_of_the_training_run_are_found_with_the_ap_of_the_dataset(cfg: CfgNode) -> None:
    run = write_run(cfg, "first", "second")
    lines = [
        {"iteration": 9, "total_loss": 3.0},
        {"iteration": 19, "first/bbox/AP": 5.0, "second/bbox/AP": 7.0},
    ]
    (run / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert find_evaluated(run).curves == {"total_loss": {9: 3.0}, "bbox/AP": {19: 5.0}}
    assert find_evaluated(run, dataset="second").curves["bbox/AP"] == {19: 7.0}


@pytest.mark.parametrize("content", ["", '{"iteration": 9, "total_l'])
def test_damaged_curves_do_not_prevent_a_report(cfg: CfgNode, content: str) -> None:
    run = write_run(cfg, "first")
    (run / "metrics.json").write_text(content)
    found = find_evaluated(run)
    assert found.curves == {}
    assert "metrics.json" in found.notes[0]


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
    with pytest.raises(ValueError, match="--val-json FILE and --val-images FOLDER"):
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
