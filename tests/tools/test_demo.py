"""tools/demo.py and what the demo makes of its photographs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_d2 import load_config
from dino_d2.engine import DINOTrainer
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"
sys.path.insert(0, str(ROOT / "tools"))

from demo_data import Photo, cut, grid, write_coco  # noqa: E402


def run_demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/demo.py", "--config-file", str(RECIPE), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_photographs_are_predicted_drawn_and_listed(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=1, size=150)
    values = config_values(data, tmp_path / "out", "demo_rectangles")
    model = DINOTrainer.build_model(load_config(str(RECIPE), values))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    photo = data[1] / "1.png"
    result = run_demo(
        "--weights", str(tmp_path / "weights.pth"), "--input", str(photo), "--output", str(tmp_path / "found"),
        "--score-threshold", "0.0", "--tile", "100", *values,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert Image.open(tmp_path / "found" / "1.png").size == (150, 150)
    objects = json.loads((tmp_path / "found" / "1.json").read_text())
    assert objects
    assert {thing["class"] for thing in objects} <= {"red", "blue"}


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


def test_missing_photograph_and_missing_weights_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    result = run_demo("--weights", str(weights), "--input", "no_photo.jpg", "--output", str(tmp_path))
    assert result.returncode != 0
    assert "no_photo.jpg" in result.stderr
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    result = run_demo("--weights", str(weights), "--input", str(photo), "--output", str(tmp_path))
    assert result.returncode != 0
    assert "weights.pth" in result.stderr


@pytest.fixture
def photo() -> Photo:
    return Photo(
        np.zeros((100, 200, 3), np.uint8), np.array([[10.0, 10, 30, 30], [90, 40, 110, 60], [150, 80, 190, 99]])
    )


def test_cut_keeps_trees_that_are_half_visible_and_moves_them(photo: Photo) -> None:
    part = cut(photo, 100, 30, 100, 70)
    assert part.pixels.shape == (70, 100, 3)
    assert part.boxes.tolist() == [[0, 10, 10, 30], [50, 50, 90, 69]]
    assert len(cut(photo, 101, 30, 99, 70).boxes) == 1


def test_tiles_without_overlap_show_every_tree_at_least_once(photo: Photo) -> None:
    assert sum(len(tile.boxes) for tile in grid(photo, 60, 0)) >= 2
    assert sum(tile.pixels.shape[0] * tile.pixels.shape[1] for tile in grid(photo, 50, 0)) == 100 * 200


def test_annotations_are_coco(photo: Photo, tmp_path: Path) -> None:
    write_coco([photo], tmp_path / "a.json", tmp_path / "images")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["annotations"][0]["bbox"] == [10, 10, 20, 20]
    assert content["images"][0] == {"id": 1, "file_name": "0001.png", "height": 100, "width": 200}
    assert Image.open(tmp_path / "images" / "0001.png").size == (200, 100)
