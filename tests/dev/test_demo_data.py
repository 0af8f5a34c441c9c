"""What the demo makes of its photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev.demo_data import Photo, cut, grid, write_coco


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
