"""What people do with what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image
from pycocotools.coco import COCO

from dino_d2 import Detections, fonts
from dino_d2.detections import COCO_IDS, COLOURS
from dino_d2.fonts import load_font

BOXES = [[10, 20, 30, 50], [0, 0, 60, 40], [5, 5, 9, 9]]


def found(image: np.ndarray | None = None, names: tuple[str, ...] = ("cat", "dog", "elk")) -> Detections:
    return Detections(
        np.array(BOXES, np.float32), np.array([0.9, 0.6, 0.2], np.float32), np.array([0, 1, 0]), names, (60, 80), image
    )


def test_objects_come_one_by_one_best_first() -> None:
    detections = found()
    assert len(detections) == 3
    assert next((thing.name, thing.box) for thing in detections) == ("cat", (10, 20, 30, 50))
    assert detections[1].name == "dog"
    assert detections[-1].score == pytest.approx(0.2)
    with pytest.raises(IndexError):
        detections[3]


@pytest.mark.parametrize(
    ("which", "names"),
    [
        (slice(1, None), ["dog", "cat"]),
        ([2, 0], ["cat", "cat"]),
        ([], []),
        (np.array([False, True, False]), ["dog"]),
    ],
)
def test_parts_are_detections(which: object, names: list[str]) -> None:
    part = found()[which]
    assert isinstance(part, Detections)
    assert part.names == names
    assert part.boxes.shape == (len(names), 4)


def test_filters_by_score_and_class() -> None:
    assert found().above(0.5).names == ["cat", "dog"]
    assert found().of("dog").names == ["dog"]
    assert found().of("cat", "dog").above(0.5).names == ["cat", "dog"]
    assert len(found().of("elk")) == 0
    with pytest.raises(ValueError, match="unknown class dok; did you mean dog"):
        found().of("dok")


def test_classes_without_names_have_numbers() -> None:
    assert found(names=()).names == ["class 0", "class 1", "class 0"]
    assert len(found(names=()).of("class 0")) == 2
    assert len(found(names=()).of("class 2")) == 0  # it may be in other images
    with pytest.raises(ValueError, match="unknown class cat; without names the classes are class 0"):
        found(names=()).of("cat")


def test_picture_shows_boxes_and_is_left_as_it_was() -> None:
    picture = np.zeros((60, 80, 3), np.uint8)
    drawn = np.asarray(found(picture).draw())
    assert not picture.any()
    assert tuple(drawn[50, 20]) == COLOURS[0]  # lower edge of the best
    assert tuple(drawn[39, 60]) == COLOURS[1]
    with pytest.raises(ValueError, match="the image has 80 x 61"):
        found().draw(np.zeros((61, 80, 3), np.uint8))
    with pytest.raises(ValueError, match="was not kept"):
        found().draw()


def test_labels_at_every_edge_are_drawn() -> None:
    edges = np.array([[0, 0, 80, 60], [70, 0, 80, 5], [-5, -5, 2, 2], [75, 55, 90, 70]], np.float32)
    detections = Detections(edges, np.ones(4, np.float32), np.arange(4), (), (60, 80), np.zeros((60, 80, 3), np.uint8))
    assert np.asarray(detections.draw()).any()


def drawn_as(name: str) -> bytes:
    return found(np.zeros((60, 80, 3), np.uint8), names=(name,) * 3).draw().tobytes()


@pytest.mark.parametrize("letters", ["äéñş", "Ωλ", "Жц"])
def test_letters_are_told_apart(letters: str) -> None:
    assert len({drawn_as(letter) for letter in letters}) == len(letters)


def test_the_font_that_has_most_letters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "font_names", lambda: ["cmr10", "DejaVu Sans", "DejaVu Serif"])
    assert load_font(12, ["cat"]).getname()[0] == "cmr10"
    assert load_font(12, ["cat", "Жц"]).getname()[0] == "DejaVu Sans"


def test_names_are_drawn_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only OnnxPredictor is installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert drawn_as("cat") != drawn_as("dog")


def test_picture_and_list_are_saved(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (80, 60)).save(photo)
    detections = found()
    detections.image = str(photo)
    detections.save(tmp_path / "new" / "drawn.png")
    detections.save(tmp_path / "new" / "listed.json")
    assert np.asarray(Image.open(tmp_path / "new" / "drawn.png")).any()
    assert json.loads((tmp_path / "new" / "listed.json").read_text())[1] == {
        "class": "dog",
        "score": 0.6,
        "box_xyxy": [0.0, 0.0, 60.0, 40.0],
    }
    assert Image.open(tmp_path / "new" / "drawn.png").size == (80, 60)
    assert detections._repr_png_()[1:4] == b"PNG"


def test_coco_takes_the_results() -> None:
    results = found().to_coco(7)
    assert results[0] == {"image_id": 7, "category_id": 1, "bbox": [10, 20, 20, 30], "score": pytest.approx(0.9)}
    assert [result["category_id"] for result in found().to_coco(7, [10, 20, 30])] == [10, 20, 10]
    assert [result["category_id"] for result in found(names=()).to_coco(7)] == [1, 2, 1]
    coco = COCO()
    coco.dataset = {"info": {}, "images": [{"id": 7}], "categories": [{"id": 1}, {"id": 2}], "annotations": []}
    coco.createIndex()
    assert len(coco.loadRes(json.loads(json.dumps(results))).anns) == 3


def test_classes_of_coco_have_its_numbers() -> None:
    categories = sorted((c for c in COCO_CATEGORIES if c["isthing"]), key=lambda c: c["id"])
    assert [c["id"] for c in categories] == list(COCO_IDS)
    detections = found(names=tuple(c["name"] for c in categories))
    detections.classes = np.array([0, 11, 79])
    assert [result["category_id"] for result in detections.to_coco(1)] == [1, 13, 90]


def test_other_libraries_take_them() -> None:
    instances = found().to_instances()
    assert instances.image_size == (60, 80)
    assert instances.pred_boxes.tensor.tolist() == BOXES
    assert instances.pred_classes.tolist() == [0, 1, 0]
    pandas = pytest.importorskip("pandas")
    frame = found().to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[1, ["name", "x2"]].tolist() == ["dog", 60]


def test_label_studio_takes_them() -> None:
    """The fields that its documentation requires of pre-annotations with rectangles, in percent of the image."""
    detections = found()
    detections.image = "photo.jpg"
    task = json.loads(json.dumps(detections.to_label_studio()))
    assert task["data"] == {"image": "photo.jpg"}
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "dino_d2"
    assert prediction["score"] == pytest.approx((0.9 + 0.6 + 0.2) / 3)
    first, second, _ = prediction["result"]
    assert first == {
        "id": "object_0",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 80,
        "original_height": 60,
        "image_rotation": 0,
        "value": {
            "x": pytest.approx(12.5),
            "y": pytest.approx(100 * 20 / 60),
            "width": pytest.approx(25),
            "height": pytest.approx(50),
            "rotation": 0,
            "rectanglelabels": ["cat"],
        },
        "score": pytest.approx(0.9),
    }
    assert second["value"]["rectanglelabels"] == ["dog"]
    assert len({region["id"] for region in prediction["result"]}) == 3


def test_label_studio_gets_names_and_boxes_inside_the_image() -> None:
    detections = found(np.zeros((60, 80, 3), np.uint8))
    detections.boxes = np.array([[-8, -6, 88, 66], [0, 0, 1, 1], [79, 59, 90, 90]], np.float32)
    options = {"from_name": "box", "to_name": "photo", "model_version": "mine"}
    task = detections.to_label_studio("https://example.org/photo.jpg", **options)
    regions = task["predictions"][0]["result"]
    assert {(region["from_name"], region["to_name"]) for region in regions} == {("box", "photo")}
    assert [regions[0]["value"][side] for side in ("x", "y", "width", "height")] == [0, 0, 100, 100]
    last = regions[2]["value"]
    assert (last["x"] + last["width"], last["y"] + last["height"]) == (100, 100)
    empty = detections[[]].to_label_studio("photo.jpg")["predictions"][0]
    assert empty == {"model_version": "dino_d2", "score": 0.0, "result": []}
    with pytest.raises(ValueError, match="needs a URL or a path: pass it to to_label_studio"):
        detections.to_label_studio()


def test_supervision_takes_them() -> None:
    pytest.importorskip("supervision")
    detections = found().to_supervision()
    assert detections.xyxy.tolist() == BOXES
    assert detections.data["class_name"].tolist() == ["cat", "dog", "cat"]
    assert len(found().of("elk").to_supervision()) == 0


def test_they_say_what_they_are() -> None:
    assert repr(found()) == "<3 detections in 80 x 60 pixels: 2 cat, 1 dog; best cat 0.90, dog 0.60, cat 0.20>"
    assert repr(found().of("elk")) == "<0 detections in 80 x 60 pixels: nothing>"
