"""`dino-d2 robustness`: AP on corrupted images and at other sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

from dino_d2 import load_config
from dino_d2.data import register_datasets
from dino_d2.evaluation import robustness
from dino_d2.evaluation.corruptions import CORRUPTIONS, corrupt
from dino_d2.evaluation.robustness import CorruptedImages, choose_cells, resized
from dino_d2.evaluation.robustness_folder import CLEAN, Cell, as_table, summarize
from dino_d2.tools import robustness as tool
from tests.synthetic import config_values, write_rectangles

SET = "rectangles_of_robustness"


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the weights of a tiny detector, and with four images."""
    folder = tmp_path_factory.mktemp("robustness")
    cfg = load_config("dino_r50_4scale_12ep", config_values(write_rectangles(folder, 4, size=64), folder, SET))
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Evaluated cells; AP is the strength, 50 without corruption, times the size."""
    cells: list[Cell] = []

    def evaluate(self: robustness.Evaluation, cell: Cell) -> float:
        cells.append(cell)
        return (cell.strength or 50) * cell.size

    monkeypatch.setattr(robustness.Evaluation, "__call__", evaluate)
    return cells


def run(files: Path, output: Path, *options: str) -> int:
    return tool.main(["--weights", str(files), "-o", str(output), *options])


def read(output: Path) -> dict:
    return json.loads((output / "robustness.json").read_text())


def test_ap_is_measured_in_every_cell(model_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(model_files, tmp_path, "--corruptions", "fog,contrast", "--strengths", "1,5", "--sizes", "0.5,2") == 0
    result = read(tmp_path)
    assert list(result["corruptions"]) == ["fog", "contrast"]
    assert [ap is None for ap in result["corruptions"]["fog"]] == [False, True, True, True, False]
    assert (result["mPC"], result["rPC"]) == (None, None)
    assert list(result["sizes"]) == ["0.5", "1", "2"]
    assert result["sizes"]["1"] == result["clean"]
    aps = [result["sizes"]["0.5"], result["sizes"]["2"], result["clean"], result["corruptions"]["contrast"][4]]
    assert all(0 <= ap <= 100 for ap in aps)
    printed = capsys.readouterr().out
    assert "size_2: AP " in printed
    assert "(7 of 7)" in printed
    assert "AP on clean images: " in printed
    with Image.open(tmp_path / "corruptions.jpg") as sheet:  # four rows of four
        assert min(sheet.size) > 4 * 320


def test_processes_give_the_same(model_files: Path, tmp_path: Path) -> None:
    options = ("--corruptions", "gaussian_noise", "--strengths", "2", "--sizes", "none")
    run(model_files, tmp_path / "one", *options)
    run(model_files, tmp_path / "two", *options, "--processes", "2")
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_a_stopped_command_goes_on(
    model_files: Path, tmp_path: Path, counted: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = robustness.Evaluation.__call__

    def stopped(self: robustness.Evaluation, cell: Cell) -> float:
        if len(counted) == 3:
            raise KeyboardInterrupt
        return evaluate(self, cell)

    options = ("--corruptions", "fog,frost", "--sizes", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr(robustness.Evaluation, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(model_files, tmp_path, *options)
    assert read(tmp_path)["corruptions"] == {"fog": [1, 2, None, None, None]}
    run(model_files, tmp_path, *options)
    assert len(counted) == len(set(counted)) == 12
    run(model_files, tmp_path)
    assert len(counted) == len(set(counted)) == 81
    result = read(tmp_path)
    assert result["mPC"] == pytest.approx(3)
    assert result["rPC"] == pytest.approx(6)
    assert result["sizes"] == {"0.25": 12.5, "0.5": 25, "0.75": 37.5, "1": 50, "1.5": 75, "2": 100}


def test_other_settings_or_weights_are_refused(
    model_files: Path, tmp_path: Path, counted: list[Cell], capsys: pytest.CaptureFixture
) -> None:
    output, none = tmp_path / "out", ("--corruptions", "none", "--sizes", "none")
    run(model_files, output, *none)
    run(model_files, output, *none, "OUTPUT_DIR", "elsewhere", "DATALOADER.NUM_WORKERS", "3")
    with pytest.raises(SystemExit):
        run(model_files, output, *none, "INPUT.MIN_SIZE_TEST", "64")
    assert "holds another evaluation:\n  INPUT.MIN_SIZE_TEST was 128, is now 64\nGive" in capsys.readouterr().err
    weights = torch.load(model_files / "model_final.pth", weights_only=True)
    name = next(name for name, value in weights["model"].items() if value.is_floating_point() and value.numel())
    weights["model"][name] = weights["model"][name] + 1
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(SystemExit):
        tool.main(
            [
                "--weights",
                str(tmp_path / "other.pth"),
                "--config-file",
                str(model_files / "config.yaml"),
                "-o",
                str(output),
            ]
        )
    assert "\n  weights was " in capsys.readouterr().err
    assert counted == [CLEAN]


def test_other_data_are_given_as_files(model_files: Path, tmp_path: Path, counted: list[Cell]) -> None:
    annotations, images = write_rectangles(tmp_path / "other", 2, size=64)
    options = ("--val-json", str(annotations), "--val-images", str(images), "--corruptions", "none", "--sizes", "none")
    run(model_files, tmp_path / "out", *options)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["data set"] == "own_val"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corruptions", "fogg"], "no corruption fogg; did you mean fog?"),
        (["--strengths", "0"], "strength 0: it must be one of 1, 2"),
        (["--strengths", "strong"], "strong is not a list such as 1,3"),
        (["--sizes", "-1"], "size -1: it must be a factor above 0"),
        (["--processes", "0"], "--processes 0"),
        (["--val-json", "x"], "must be given together"),
        (["--dataset", "nothing"], "the data set 'nothing' is not known"),
        (["INPUT.MIN_SIZE_TEST", "0"], "other sizes need a size in INPUT.MIN_SIZE_TEST"),
    ],
)
def test_wrong_options_are_named(
    model_files: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        run(model_files, tmp_path / "out", *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_images_are_corrupted_before_they_are_resized(model_files: Path, channels: str) -> None:
    cfg = load_config(str(model_files / "config.yaml"), ["INPUT.FORMAT", channels])
    register_datasets(cfg)
    records = list(DatasetCatalog.get(SET))
    clean, noisy = (CorruptedImages(cfg, cell) for cell in (CLEAN, Cell("impulse_noise", 4)))
    (pixels, _), (corrupted, _) = clean.read(records[0]), noisy.read(records[0])
    assert corrupted.shape == pixels.shape == (64, 64, 3)
    order = slice(None, None, -1 if channels == "BGR" else 1)
    patterns = [corrupt(pixels[..., order], "impulse_noise", 4, seed)[..., order] for seed in (0, 1)]
    assert 0.14 < np.mean(corrupted != pixels) < 0.19
    assert not any(np.array_equal(corrupted, pattern) for pattern in patterns)  # the image's own
    np.testing.assert_array_equal(corrupted, noisy.read(records[0])[0])
    assert not np.array_equal(corrupted, noisy.read(records[1] | {"file_name": records[0]["file_name"]})[0])
    assert noisy(records[0])["image"].shape == (3, 128, 128)


def test_grey_images_are_corrupted_as_colour_images_are(model_files: Path) -> None:
    cfg = load_config(str(model_files / "config.yaml"), ["INPUT.FORMAT", "L"])
    register_datasets(cfg)
    record = next(iter(DatasetCatalog.get(SET)))
    pixels, _ = CorruptedImages(cfg, CLEAN).read(record)
    corrupted, _ = CorruptedImages(cfg, Cell("brightness", 3)).read(record)
    assert corrupted.shape == pixels.shape == (64, 64, 1)
    assert corrupted.mean() > pixels.mean() + 20


def test_sizes_multiply_the_configured_one() -> None:
    cfg = load_config("dino_r50_4scale_12ep")
    small = resized(cfg, 0.25)
    assert (small.INPUT.MIN_SIZE_TEST, small.INPUT.MAX_SIZE_TEST) == (200, 333)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    assert resized(cfg, 1) is cfg


def test_clean_images_come_first_and_nothing_twice() -> None:
    assert choose_cells(["fog"], [2], [1, 0.5, 1]) == [CLEAN, Cell("fog", 2), Cell(size=0.5)]


def test_what_is_not_found_counts_as_nothing(model_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = robustness.Evaluation(robustness.Source(str(model_files), None))
    monkeypatch.setattr(robustness, "inference_on_dataset", lambda *_: {"bbox": {"AP": math.nan}})
    assert evaluate(Cell("fog", 5)) == 0
    with pytest.raises(ValueError, match="AP is not defined: rectangles_of_robustness has no annotated objects"):
        evaluate(CLEAN)


def test_relative_performance_needs_a_detector_that_finds_something() -> None:
    cells = {Cell(name, strength): 0.0 for name in CORRUPTIONS for strength in range(1, 6)}
    result = summarize(cells | {CLEAN: 0.0})
    assert (result["mPC"], result["rPC"]) == (0, None)
    assert "rPC, of clean AP: –" in as_table(result)
