"""From repositories of Pascal VOC files, or a folder, to COCO JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dev.demo_data import Photo
from studies import data
from studies.data import Repository, convert, hold_back, make, make_trees, split_cards, split_raccoons
from studies.plan import Study
from tests.studies.conftest import read_json, write_data

Objects = Sequence[tuple[str, tuple[float, float, float, float]]]


def write_voc(image: Path, annotations: Path, size: tuple[int, int], objects: Objects) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(image)
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    (annotations / f"{image.stem}.xml").write_text(f"<annotation>{boxes}</annotation>")


def test_boxes_are_scaled_with_the_picture_and_clipped(tmp_path: Path) -> None:
    objects = [("king", (81, 88, 522, 408)), ("ace", (600, 400, 700, 500)), ("ace", (5, 5, 5, 9))]
    for name in ("a", "b"):
        write_voc(tmp_path / f"{name}.JPG", tmp_path, (650, 417), objects)
    out = tmp_path / "out"
    out.mkdir()
    convert({"train": [(tmp_path / f"{name}.JPG", tmp_path / f"{name}.xml") for name in "ab"], "test": []}, out)
    content = read_json(out / "train.json")
    assert content["categories"] == [{"id": 1, "name": "ace"}, {"id": 2, "name": "king"}]
    assert content["images"][0] == {"id": 1, "file_name": "a.jpg", "width": 640, "height": 411}
    assert Image.open(out / "train" / "a.jpg").size == (640, 411)
    first, second, *_ = content["annotations"]
    assert first["category_id"] == 2
    assert (first["bbox"], first["area"]) == ([79.75, 86.73, 434.22, 315.4], 136949.66)
    x, y, width, height = second["bbox"]
    assert (x + width, y + height) == pytest.approx((640, 411), abs=0.01)
    assert len(content["annotations"]) == 4  # the box without area is left out of both


def test_small_pictures_keep_their_size(tmp_path: Path) -> None:
    write_voc(tmp_path / "a.png", tmp_path, (40, 30), [("ace", (1, 2, 11, 22))])
    scaled = data.read_scaled(tmp_path / "a.png", tmp_path / "a.xml")
    assert (scaled.image.size, scaled.boxes) == ((40, 30), [[1, 2, 10, 20]])


def test_every_fifth_raccoon_is_for_the_test(tmp_path: Path) -> None:
    for number in range(1, 12):
        objects = [("raccoon", (1, 1, 9, 9))]
        write_voc(tmp_path / "images" / f"raccoon-{number}.jpg", tmp_path / "annotations", (20, 20), objects)
    split = split_raccoons(tmp_path)
    assert [image.stem for image, _ in split["test"]] == ["raccoon-1", "raccoon-4", "raccoon-9"]  # 1, 10, 11, 2, …
    assert len(split["train"]) == 8


def test_cards_keep_the_repository_s_split(tmp_path: Path) -> None:
    for part, names in (("train", "abc"), ("test", "de")):
        for name in names:
            folder = tmp_path / "images" / part
            write_voc(folder / f"{name}.jpg", folder, (20, 20), [("ace", (1, 1, 9, 9))])
    split = split_cards(tmp_path)
    assert {part: [image.stem for image, _ in entries] for part, entries in split.items()} == {
        "train": ["a", "b", "c"],
        "test": ["d", "e"],
    }


def test_a_checkout_without_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images with Pascal VOC files"):
        split_raccoons(tmp_path)


def test_a_part_is_held_back_by_name(tmp_path: Path) -> None:
    write_data(tmp_path)
    hold_back(tmp_path)
    whole, fit, held = (read_json(tmp_path / f"{part}.json") for part in ("train", "train_fit", "train_held"))

    def names(content: dict) -> set[str]:
        return {image["file_name"] for image in content["images"]}

    assert names(held)
    assert names(fit) | names(held) == names(whole)
    assert not names(fit) & names(held)
    assert len(fit["annotations"]) + len(held["annotations"]) == len(whole["annotations"])


def test_held_back_trees_are_on_no_other_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pixel of the training photograph has a colour of its own."""
    height, width = 450, 1600
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    pixels = np.stack([columns % 256, columns // 256 + 8 * (rows // 256), rows % 256], axis=2).astype(np.uint8)
    corners = np.stack(np.meshgrid(np.arange(10, 1550, 60), np.arange(10, 400, 60)), axis=-1).reshape(-1, 2)
    photo = Photo(pixels, np.hstack([corners, corners + 30]).astype(float))
    monkeypatch.setattr(data, "read_photo", lambda folder, which: photo)
    make_trees(tmp_path, tmp_path)

    def columns_of(part: str) -> set[int]:
        images = [np.asarray(Image.open(file)).astype(int) for file in (tmp_path / part).glob("*.png")]
        return {column for image in images for column in np.unique(image[..., 0] + 256 * (image[..., 1] % 8)).tolist()}

    assert columns_of("train_fit") == set(range(1200))
    assert columns_of("train_held") == set(range(1200, 1600))
    assert columns_of("train") == set(range(1600))


@pytest.fixture
def three(make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of raccoons and cards; the backbone's weights are not asked for."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "data" / data.BACKBONE).touch()
    return make_study(data={"raccoon": None})


def test_ready_data_are_copied_once(three: Study, tmp_path: Path) -> None:
    write_data(tmp_path / "source" / "raccoon")
    with pytest.raises(FileNotFoundError, match=r"must hold test.json"):
        make(three, tmp_path / "source")
    (tmp_path / "source" / "raccoon" / "test").mkdir()
    lines: list[str] = []
    make(three, tmp_path / "source", lines.append)
    folder = tmp_path / "work" / "data" / "raccoon"
    assert {file.stem for file in folder.glob("*.json")} == {"train", "test", "train_fit", "train_held"}
    assert (folder / "train" / "1.png").is_file()
    assert "train 4 images" in lines[0]
    make(three, None, lines.append)
    assert "is there" in lines[1]


def test_a_repository_is_cloned_at_its_commit(
    three: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: Callable[..., str]
) -> None:
    origin = tmp_path / "origin"
    for number in range(1, 7):
        image = origin / "images" / f"{number}.jpg"
        write_voc(image, origin / "annotations", (20, 20), [("raccoon", (1, 1, 9, 9))])
    commit = git(origin, "commit")
    (origin / "images" / "1.jpg").unlink()
    git(origin, "commit")
    monkeypatch.setitem(data.REPOSITORIES, "raccoon", Repository(f"file://{origin}", commit, split_raccoons))
    make(three, None)
    folder = tmp_path / "work" / "data" / "raccoon"
    assert [image["file_name"] for image in read_json(folder / "test.json")["images"]] == ["1.jpg", "6.jpg"]
    assert commit in (folder / data.MADE).read_text()


def test_unknown_data_are_named(make_study: Callable[..., Study]) -> None:
    with pytest.raises(ValueError, match=r"unknown_set is not a data set that can be made \(trees, raccoon, cards\)"):
        make(make_study(data={"unknown_set": None}), None)
