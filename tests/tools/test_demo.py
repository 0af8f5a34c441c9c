"""tools/demo.py, which is `dino-d2 predict`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_d2 import Detector, load_config
from dino_d2.engine import DINOTrainer
from dino_d2.tools import demo
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"


def run_demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/demo.py", "--config-file", str(RECIPE), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with weights and an image, and the config values of the model."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_rectangles(folder / "data", count=1, size=150)
    values = config_values(data, folder / "out", "demo_rectangles")
    model = DINOTrainer.build_model(load_config(str(RECIPE), values))
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return folder, values


def test_photographs_are_predicted_drawn_and_listed(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, values = trained
    photo = folder / "data" / "images" / "1.png"
    result = run_demo(
        "--weights", str(folder / "weights.pth"), "--input", str(photo), "--output", str(tmp_path / "found"),
        "--score-threshold", "0.0", "--tile", "100", *values,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert Image.open(tmp_path / "found" / "1.png").size == (150, 150)
    objects = json.loads((tmp_path / "found" / "1.json").read_text())
    assert objects
    assert {thing["class"] for thing in objects} <= {"red", "blue"}


def test_augmented_detections_are_those_of_the_detector(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, values = trained
    photo = folder / "data" / "images" / "1.png"
    result = run_demo(
        "--weights", str(folder / "weights.pth"), "--input", str(photo), "--output", str(tmp_path),
        "--score-threshold", "0", "--augment", *values,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    scores = [thing["score"] for thing in json.loads((tmp_path / "1.json").read_text())]
    detector = Detector.from_pretrained(folder / "weights.pth", str(RECIPE), device="cpu", overrides=values)
    expected = detector(photo, threshold=0, augment=True).scores
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)
    assert scores != pytest.approx(detector(photo, threshold=0).scores.tolist(), abs=1e-3)


def test_photographs_of_one_name_have_results_of_their_own(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, values = trained
    paths = [tmp_path / name for name in ("a/same.png", "b/same.png", "b/same.jpg", "b/other.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40 + number, 40)).save(path)
    result = run_demo(
        "--weights", str(folder / "weights.pth"), "--input", *map(str, paths), "--output", str(tmp_path / "found"),
        *values,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    sizes = {path.name: Image.open(path).size[0] for path in (tmp_path / "found").glob("*.png")}
    assert sizes == {"a_same.png.png": 40, "b_same.png.png": 41, "b_same.jpg.png": 42, "other.png": 43}
    assert len(list((tmp_path / "found").glob("*.json"))) == 4


def test_photograph_is_not_overwritten(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, values = trained
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(photo)
    before = photo.read_bytes()
    arguments = ("--weights", str(folder / "weights.pth"), "--input", str(photo), "--output", str(tmp_path), *values)
    result = run_demo(*arguments)
    assert result.returncode != 0
    assert f"would overwrite {photo}" in result.stderr
    assert photo.read_bytes() == before


@pytest.mark.parametrize("beside", ["photo.json", "photo.png"])  # annotations; another photograph
def test_files_beside_photographs_are_not_overwritten(beside: str, tmp_path: Path) -> None:
    photo, other = tmp_path / "photo.jpg", tmp_path / beside
    assert demo.results_for([photo], tmp_path) == {photo: tmp_path / "photo.png"}
    other.touch()
    with pytest.raises(ValueError, match=f"would overwrite .*{beside}; choose another folder"):
        demo.results_for([photo], tmp_path)
    assert demo.results_for([photo], tmp_path / "found") == {photo: tmp_path / "found" / "photo.png"}


@pytest.mark.parametrize(
    ("photos", "results"),
    [
        (["a/x.jpg", "b/y.jpg"], ["x", "y"]),
        (["a/x.jpg", "b/x.jpg", "b/y.jpg"], ["a_x.jpg", "b_x.jpg", "y"]),
        (["a/x.jpg", "a/x.png"], ["x.jpg", "x.png"]),
        (["a_b/x.jpg", "c/x.jpg", "a/b_x.jpg", "c/b_x.jpg"], ["a_b/x.jpg", "c/x.jpg", "a/b_x.jpg", "c/b_x.jpg"]),
        (["a/x.jpg", "b/x.jpg", "b/a_x.jpg.png"], ["a/x.jpg", "b/x.jpg", "b/a_x.jpg.png"]),
    ],
    ids=["other names", "other folders", "other suffixes", "folders and names alike", "named as a result"],
)
def test_no_two_photographs_have_one_result(photos: list[str], results: list[str], tmp_path: Path) -> None:
    found = demo.names_of_results([tmp_path / photo for photo in photos], Path("out"))
    assert list(found.values()) == [Path("out", f"{result}.png") for result in results]


def test_weights_without_a_class_are_refused(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=1, size=64)
    values = config_values(data, tmp_path / "out", "demo_green")
    model = DINOTrainer.build_model(load_config(str(RECIPE), values))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    result = run_demo(
        "--weights", str(tmp_path / "weights.pth"), "--input", str(data[1] / "1.png"), "--output", str(tmp_path),
        *values, "MODEL.DINO.CLASS_NAMES", "['red', 'green']",
    )  # fmt: skip
    assert result.returncode != 0
    assert "newly initialised (1): green" in result.stderr


def test_pictures_of_every_kind_are_predicted_and_a_damaged_one_is_named(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, values = trained
    exif = Image.Exif()
    exif[274] = 6
    noise = Image.effect_noise((60, 40), 50)
    noise.save(tmp_path / "damaged.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "damaged.png").read_bytes()[:300])
    noise.save(tmp_path / "grey.png")
    noise.convert("RGBA").save(tmp_path / "transparent.png")
    noise.convert("CMYK").save(tmp_path / "print.jpg")
    noise.save(tmp_path / "upright.jpg", exif=exif)
    Image.fromarray(np.asarray(noise).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.new("RGB", (20_000, 5)).save(tmp_path / "line.png")
    sizes = {"grey": (60, 40), "transparent": (60, 40), "print": (60, 40), "upright": (40, 60), "deep": (60, 40)}
    sizes |= {"pixel": (1, 1), "line": (20_000, 5)}
    photos = [str(path) for path in sorted(tmp_path.glob("*.*"))]
    result = run_demo(
        "--weights", str(folder / "weights.pth"), "--input", *photos, "--output", str(tmp_path / "found"), *values
    )
    assert result.returncode == 1
    assert "damaged.png cannot be read as an image" in result.stderr
    assert f"1 of {len(photos)} images could not be read" in result.stderr
    assert {path.stem: Image.open(path).size for path in (tmp_path / "found").glob("*.png")} == sizes


def test_missing_photograph_and_missing_weights_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    found = str(tmp_path / "found")
    result = run_demo("--weights", str(weights), "--input", "no_photo.jpg", "--output", found)
    assert result.returncode != 0
    assert "no_photo.jpg" in result.stderr
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    result = run_demo("--weights", str(weights), "--input", str(photo), "--output", found)
    assert result.returncode == 2
    assert "weights.pth" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--classes", "blue", "rad"], "unknown class rad; did you mean red?"), (["--tile", "-5"], "--tile -5")],
)
def test_wrong_class_or_tile_is_reported_once(
    trained: tuple[Path, list[str]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder, values = trained
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    photos = [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    result = run_demo(
        "--weights", str(folder / "weights.pth"), "--input", *photos, "--output", str(tmp_path / "found"), *arguments,
        "--score-threshold", "0.3", *values,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count(message) == 1
    assert "could not be read" not in result.stderr
    assert not list(tmp_path.glob("found/*"))


def test_classes_without_names_are_chosen_by_number(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Also in an image where none of them is found."""
    folder, values = trained
    values = [*values, "DATASETS.COCO_FORMAT", "[]", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    values += ["MODEL.DINO.NUM_CLASSES", "3", "MODEL.DINO.CLASS_NAMES", "[]"]
    cfg = load_config(str(RECIPE), values)
    torch.save({"model": DINOTrainer.build_model(cfg).state_dict()}, tmp_path / "weights.pth")
    result = run_demo(
        "--weights", str(tmp_path / "weights.pth"), "--input", str(folder / "data" / "images" / "1.png"),
        "--output", str(tmp_path / "found"), "--classes", "class 2", "--score-threshold", "0.99",
        *values,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "found" / "1.json").read_text()) == []
