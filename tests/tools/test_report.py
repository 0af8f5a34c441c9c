"""`dino-d2 report`: from a run, a file of detections or weights to a page, and from two runs to a comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from dino_d2.config import add_dino_config
from dino_d2.data import CocoFiles
from dino_d2.evaluation.robustness_folder import CLEAN, Cell, summarize
from dino_d2.report.evaluated import Evaluated
from dino_d2.report.make import make_comparison, report_on_run
from dino_d2.report.numbers import NumbersOptions
from dino_d2.tools import report
from tests.synthetic import COLOURS, write_rectangles

FAST = ("--resamples", "20")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An annotation file and its images."""
    return write_rectangles(tmp_path_factory.mktemp("data"), 6, size=64)


@pytest.fixture
def detections(data: tuple[Path, Path], tmp_path: Path) -> Path:
    """Every object, found exactly."""
    content = json.loads(data[0].read_text())
    entries = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in content["annotations"]
    ]
    file = tmp_path / "perfect.json"
    file.write_text(json.dumps(entries))
    return file


def of_files(data: tuple[Path, Path]) -> list[str]:
    return ["--val-json", str(data[0]), "--val-images", str(data[1])]


def test_a_file_of_detections_becomes_a_page(
    data: tuple[Path, Path], detections: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "page"
    assert report.main([str(detections), *of_files(data), "-o", str(folder), *FAST]) == 0
    assert capsys.readouterr().out.strip().endswith(str(folder / "index.html"))
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["title"] == "perfect"
    assert numbers["metrics"]["AP"]["value"] == pytest.approx(100)
    assert list((folder / "plots").glob("*.png"))


def test_two_files_are_compared(data: tuple[Path, Path], detections: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(json.loads(detections.read_text())[::2]))
    folder = tmp_path / "page"
    report.main([str(worse), str(detections), *of_files(data), "-o", str(folder), *FAST])
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["names"] == ["worse", "perfect"]
    assert numbers["metrics"]["AP"]["difference"] > 0


def test_weights_are_evaluated_first(
    tiny_config: Callable[..., CfgNode], data: tuple[Path, Path], tmp_path: Path
) -> None:
    cfg = tiny_config(NUM_CLASSES=len(COLOURS), CLASS_NAMES=list(COLOURS))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "weights.pth")
    folder = tmp_path / "out"
    weights = ["--weights", str(tmp_path / "weights.pth"), "--config-file", str(tmp_path / "config.yaml")]
    assert report.main([*weights, *of_files(data), "-o", str(folder), *FAST]) == 0
    numbers = json.loads((folder / "report.json").read_text())
    recorded = json.loads((folder / "inference" / "results.json").read_text())
    assert numbers["metrics"]["AP"]["value"] == pytest.approx(recorded["metrics"]["bbox"]["AP"])
    assert numbers["queries"]["ATD100"] == pytest.approx(recorded["metrics"]["queries"]["ATD100"], abs=1e-4)
    assert "weights.pth, SHA-256" in numbers["about"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a RUN, or --weights"),
        (["a", "b", "c", "-o", "d"], "not more"),
        (["a", "--weights", "w", "-o", "d"], "give a RUN, or --weights"),
        (["a", "b"], "give -o FOLDER"),
        (["--weights", "w"], "give -o FOLDER"),
        (["a", "--config-file", "c"], "--config-file is for --weights"),
        (["a", "--val-images", "i"], "must be given together"),
        (["a", "--resamples", "-1"], "negative"),
        (["nowhere"], "nowhere does not exist"),
        (["a", "--threshold", "5"], "threshold is 5.0"),
        (["a", "--max-dets", "5"], "max_dets is 5"),
        (["--weights", "w", "-o", "o", "--threshold", "5"], "threshold is 5.0"),  # before the evaluation
        (["a", "b", "-o", "o", "--robustness", "r"], "--robustness is for the report on one RUN"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        report.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[", '{"images": []}', '[{"image_id": 1}]', "[1]"])
def test_detections_in_another_format_are_refused_by_name(
    data: tuple[Path, Path], tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        report.main([str(file), *of_files(data), "-o", str(tmp_path / "page")])
    assert str(file) in capsys.readouterr().err


def test_robustness_is_a_chapter_if_it_was_measured_on_the_same_annotations(
    data: tuple[Path, Path], detections: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, folder = tmp_path / "robustness", tmp_path / "page"
    measured.mkdir()
    arguments = [str(detections), *of_files(data), "-o", str(folder), *FAST, "--robustness", str(measured)]
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "--robustness is the folder of dino-d2 robustness" in capsys.readouterr().err
    (measured / "robustness.json").write_text(json.dumps(summarize({CLEAN: 40.0, Cell("fog", 3): 20.0})))
    for content, message in ((b"other", "measured on other annotations"), (data[0].read_bytes(), "")):
        settings = {"annotations": hashlib.sha256(content).hexdigest()}
        (measured / "settings.json").write_text(json.dumps(settings))
        if message:
            with pytest.raises(SystemExit):
                report.main(arguments)
            assert message in capsys.readouterr().err
    report.main(arguments)
    assert json.loads((folder / "report.json").read_text())["robustness"]["clean"] == 40


def test_a_report_that_cannot_be_made_is_logged_and_the_others_are_made(
    data: tuple[Path, Path], detections: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.DATASETS.COCO_FORMAT = [["good", str(data[0]), str(data[1])], ["bad", str(data[0]), str(data[1])]]
    cfg.DATASETS.TEST = ("bad", "good")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for name, content in (("good", detections.read_text()), ("bad", "[1]")):
        (tmp_path / "inference" / name).mkdir(parents=True)
        (tmp_path / "inference" / name / "coco_instances_results.json").write_text(content)
    with caplog.at_level("INFO", "dino_d2"):
        report_on_run(tmp_path, cfg.DATASETS.TEST)
    assert "TEST.REPORT: no report on bad" in caplog.text
    assert (tmp_path / "report" / "good" / "index.html").is_file()


def test_evaluations_on_other_annotations_are_not_compared(
    data: tuple[Path, Path], detections: Path, tmp_path: Path
) -> None:
    other, _ = write_rectangles(tmp_path / "other", 2, size=64)
    first, second = (
        Evaluated("run", CocoFiles(file, data[1]), tmp_path / "unused", 100, {}) for file in (data[0], other)
    )
    with pytest.raises(ValueError, match="only evaluations on the same annotations"):
        make_comparison(first, second, tmp_path / "page", NumbersOptions())
