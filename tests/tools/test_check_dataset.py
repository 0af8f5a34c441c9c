"""tools/check_dataset.py and the options of tools/train_net.py for data given as files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from dino_d2 import load_config
from dino_d2.checkpoint.assumptions import Assumptions
from dino_d2.data import class_names
from dino_d2.data.contact_sheet import NEGATIVE, OBJECT, POSITIVE
from dino_d2.data.datasets import TRAIN_NAME, VAL_NAME
from dino_d2.engine.run import train_or_evaluate
from dino_d2.tools import check_dataset, train_net
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"


@pytest.fixture
def data(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    yield write_rectangles(tmp_path / "data", count=3, size=96, empty=1)
    for name in {TRAIN_NAME, VAL_NAME} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def check(data: tuple[Path, Path], output: Path, *overrides: str) -> int:
    return check_dataset.main(["--json", str(data[0]), "--images", str(data[1]), "--output", str(output), *overrides])


def shows(picture: np.ndarray, colour: tuple[float, ...]) -> bool:
    distance = np.abs(picture - 255 * np.array(colour)).max(-1)
    return bool((distance < 40).sum() > 50)


def test_sound_data_passes_and_is_drawn(data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check(data, tmp_path / "out", "SEED", "1") == 0
    printed = capsys.readouterr().out
    assert "2 classes: red, blue" in printed
    assert "images without boxes" in printed
    sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB")).astype(float)[64:]
    assert shows(sheet, POSITIVE)
    assert shows(sheet, NEGATIVE)
    assert shows(sheet, OBJECT)

    assert check(data, tmp_path / "off", "SEED", "1", "MODEL.DINO.DN.TYPE", "none") == 0
    sheet = np.asarray(Image.open(tmp_path / "off" / "contact_sheet.png").convert("RGB")).astype(float)[64:]
    assert shows(sheet, OBJECT)
    assert not shows(sheet, POSITIVE)


def test_formulas_as_names_and_very_long_images_are_drawn(data: tuple[Path, Path], tmp_path: Path) -> None:
    content = json.loads(data[0].read_text())
    content["categories"][0]["name"] = "$100_$50"
    Image.new("RGB", (4000, 4)).save(data[1] / "1.png")
    content["images"][0] |= {"width": 4000, "height": 4}
    for annotation in content["annotations"]:
        annotation["category_id"] = 1
        annotation["bbox"] = [1, 1, 40, 2] if annotation["image_id"] == 1 else annotation["bbox"]
    data[0].write_text(json.dumps(content))
    assert check(data, tmp_path / "out") == 0
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_folder_is_checked_part_by_part(data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "folder"
    for part in ("train", "val"):
        shutil.copytree(data[1], folder / part)
        shutil.copy(data[0], folder / f"{part}.json")
    assert check_dataset.main(["--data", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("reading the images") == 2
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    (folder / "val" / "1.png").unlink()
    assert check_dataset.main(["--data", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert "missing images" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main(["--data", str(folder), "--json", str(data[0]), "--images", str(data[1])])
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main([])


def test_errors_are_printed_and_nothing_is_drawn(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (data[1] / "2.png").unlink()
    assert check(data, tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "missing images" in printed
    assert "2.png" in printed
    assert not (tmp_path / "out").exists()


def test_unreadable_annotations_and_contradicting_configs_are_named(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        check(data, tmp_path / "out", "MODEL.DINO.NUM_CLASSES", "3")
    assert "MODEL.DINO.NUM_CLASSES is 3" in capsys.readouterr().err
    data[0].write_text("nonsense")
    with pytest.raises(SystemExit, match="2"):
        check(data, tmp_path / "out")
    assert "annotations.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-json", "a.json"], "--train-json and --train-images must be given together"),
        (["--val-images", "folder"], "--val-json and --val-images must be given together"),
        (["--val-json", "a.json", "--val-images", "folder"], "--val-json needs --train-json"),
        (["--eval-only", "--train-json", "a.json", "--train-images", "folder"], "uses --val-json"),
    ],
)
def test_options_given_in_part_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_net.parse(["--config-file", str(RECIPE), *arguments])
    assert message in capsys.readouterr().err


def test_faulty_file_ends_training_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = train_net.parse(
        ["--config-file", str(RECIPE), "--train-json", str(tmp_path / "no.json"), "--train-images", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="2"):
        train_or_evaluate(args)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no.json does not exist" in line


def test_files_are_trained_on_and_evaluated_and_their_classes_are_saved(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    content = json.loads(data[0].read_text())
    for entry in (*content["categories"], *content["annotations"]):  # ids 10 and 20 instead of 1 and 2
        key = "id" if "name" in entry else "category_id"
        entry[key] *= 10
    data[0].write_text(json.dumps(content))

    output = tmp_path / "run"
    values = config_values(data, output, "unused")
    for key in ("MODEL.DINO.NUM_CLASSES", "DATASETS.COCO_FORMAT", "DATASETS.TRAIN", "DATASETS.TEST"):
        place = values.index(key)
        del values[place : place + 2]
    files = [str(path) for path in data]
    command = [
        sys.executable, "tools/train_net.py", "--config-file", str(RECIPE),
        "--train-json", files[0], "--train-images", files[1], "--val-json", files[0], "--val-images", files[1],
        *values, "SOLVER.MAX_ITER", "2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "AP,AP50,AP75" in result.stdout
    state = torch.load(output / "model_final.pth", weights_only=False)["model"]
    assert Assumptions.from_tensor(state["_extra_state"]).class_names == ("red", "blue")
    assert class_names(load_config(str(output / "config.yaml"))) == ["red", "blue"]  # what tools/demo.py shows
