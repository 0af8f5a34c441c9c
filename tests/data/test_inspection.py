"""Each thing that inspection looks for is put into a sound dataset, and found; nothing else is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dino_d2.data import CocoFiles, inspection
from dino_d2.data.inspection import Finding, Kind, inspect_dataset, training_can_start
from dino_d2.modeling.denoising import ContrastiveDenoising

Content = dict[str, list[dict[str, Any]]]
SIDE = 64
LARGE = (800, 1333)  # INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST
FINE = {"area": 600, "iscrowd": 0}


@pytest.fixture
def files(tmp_path: Path) -> CocoFiles:
    """Two images with one object of each class."""
    images, annotations = [], []
    for number in (1, 2):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        annotations.append({"id": number, "image_id": number, "category_id": number, "bbox": [4, 4, 20, 30]} | FINE)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    return CocoFiles(tmp_path / "data.json", tmp_path)


def inspect(
    files: CocoFiles, denoising: ContrastiveDenoising | None = None, input_size: tuple[int, int] = LARGE
) -> dict[Kind, Finding]:
    findings = inspect_dataset(files, denoising, input_size)
    return {finding.kind: finding for finding in findings}


def change(files: CocoFiles, edit: Callable[[Content], object]) -> None:
    content = json.loads(files.annotations.read_text())
    edit(content)
    files.annotations.write_text(json.dumps(content))


def denoising(number: int, max_queries: int) -> ContrastiveDenoising:
    return ContrastiveDenoising(2, 8, number, 0.5, 1.0, False, max_queries)


def test_nothing_is_found_in_a_sound_data_set(files: CocoFiles) -> None:
    assert inspect_dataset(files, denoising(100, 0), (64, 64)) == []
    assert training_can_start([])


@pytest.mark.parametrize(
    ("input_size", "found"),
    [((20, 100), 2), ((14, 100), 3), ((200, 20), 2), ((21, 100), 0), ((200, 21), 0), (LARGE, 0), ((0, 0), 0)],
)
def test_objects_that_the_model_sees_too_small(input_size: tuple[int, int], found: int, files: CocoFiles) -> None:
    """Two of 20 x 30 pixels, whose area is that of 8 x 8 where 64 pixels become 21, and a larger one."""
    change(files, more([1, 1, 30, 40]))
    findings = inspect(files, input_size=input_size)
    kinds = [kind for kind in findings if kind.what.startswith("objects below 8 pixels")]
    assert [findings[kind].count for kind in kinds] == ([found] if found else [])
    for kind in kinds:
        assert "INPUT.MIN_SIZE_TEST" in kind.what
        assert "tiles" in kind.advice
        assert findings[kind].examples[0].startswith("id 1 in 1.png: 20 x 30, ")


def test_few_small_objects_among_many_are_nothing_to_report(files: CocoFiles) -> None:
    def add(content: Content) -> None:
        for number in range(10, 30):
            box = [number, 1, 3, 3] if number < 12 else [number, 1, 20, 20]
            content["annotations"].append({"id": number, "image_id": 1, "category_id": 1, "bbox": box} | FINE)

    change(files, add)
    assert inspect(files, input_size=(64, 64)) == {}


def more(box: list, **others: Any) -> Callable[[Content], None]:
    """Adds an object to the first image."""
    return lambda c: c["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, "bbox": box} | FINE | others)


@pytest.mark.parametrize(
    ("edit", "kind", "example"),
    [
        (more([1, 1, 0, 5]), inspection.ZERO_AREA, "id 9"),
        (more([1, 1, -3, 5]), inspection.NEGATIVE_BOX, "id 9"),
        (more([50, 1, 20, 5]), inspection.PARTLY_OUTSIDE, "id 9 in 1.png"),
        (more([-9, 1, 20, 5]), inspection.PARTLY_OUTSIDE, "id 9 in 1.png"),
        (more([1, 50, 5, 20]), inspection.PARTLY_OUTSIDE, "id 9 in 1.png"),
        (more([SIDE, 1, 5, 5]), inspection.OUTSIDE, "id 9 in 1.png"),
        (more([1, -9, 5, 5]), inspection.OUTSIDE, "id 9 in 1.png"),
        (more([4, 4, 20, 30]), inspection.DUPLICATE, "id 9 in 1.png"),
        (more([1, 1, 5, 5], iscrowd=1), inspection.CROWD, "id 9"),
        (lambda c: c["annotations"][0].pop("area"), inspection.INCOMPLETE, "id 1"),
        (lambda c: c["annotations"][0].update(area=None), inspection.INCOMPLETE, "id 1"),
        (lambda c: c["annotations"][0].update(iscrowd=None), inspection.INCOMPLETE, "id 1"),
        (more([1, 1, 5, 5], ignore=1), inspection.IGNORED, "id 9"),
        (more([1, 1, 5, 5], segmentation=[[1, 1, 2, 2]]), inspection.NO_POLYGON, "id 9"),
        (more([1, 1, 5, 5], image_id=77), inspection.UNKNOWN_IMAGE, "image 77"),
        (more([1, 1, 5, 5], image_id=None), inspection.BROKEN_ANNOTATION, "entry 2"),
        (more([1, 1, 5, 5], category_id=77), inspection.UNKNOWN_CATEGORY, "category 77"),
        (more([1, 1, 5, 5], id=1), inspection.REPEATED_ANNOTATION_ID, "id 1"),
        (more([1, 1, 5]), inspection.NO_BOX, "id 9"),
        (more([1, 1, 5, "5"]), inspection.NO_BOX, "id 9"),
        (more([1, 1, 5, math.nan]), inspection.NO_BOX, "nan"),
        (lambda c: c["images"].append(dict(c["images"][0])), inspection.REPEATED_IMAGE_ID, "id 1"),
        (lambda c: c["images"].append({"id": 3, "file_name": "3.png"}), inspection.BROKEN_IMAGE_ENTRY, "3.png"),
        (lambda c: c["images"].append(c["images"][0] | {"id": 3}), inspection.EMPTY_IMAGE, "1.png"),
        (lambda c: c["categories"].append({"id": 3, "name": "cow"}), inspection.EMPTY_CATEGORY, "cow"),
        (lambda c: c["categories"][1].update(name="cat"), inspection.REPEATED_NAME, "cat"),
    ],
)  # fmt: skip
def test_fault_in_the_annotation_file_is_found(
    files: CocoFiles, edit: Callable[[Content], None], kind: Kind, example: str
) -> None:
    change(files, edit)
    found = inspect(files)
    assert set(found) == {kind}
    assert found[kind].count == 1
    assert example in found[kind].examples[0]
    assert training_can_start(found.values()) == (kind.severity is not inspection.Severity.ERROR)


def test_box_that_leaves_its_image_by_rounding_is_no_finding(files: CocoFiles) -> None:
    change(files, more([-0.4, 0, SIDE + 0.8, SIDE]))
    assert inspect(files) == {}


def test_gap_in_the_category_ids_is_mentioned_only(files: CocoFiles) -> None:
    def edit(content: Content) -> None:
        content["categories"][1]["id"] = content["annotations"][1]["category_id"] = 5

    change(files, edit)
    found = inspect(files)
    assert found[inspection.ID_GAP].examples == ("2 to 4",)
    assert training_can_start(found.values())


def test_files_that_are_missing_broken_or_of_another_size(files: CocoFiles) -> None:
    Image.new("RGB", (SIDE, SIDE + 6)).save(files.images / "1.png")
    found = inspect(files)
    assert found[inspection.OTHER_SIZE].examples == ("1.png: 64 x 70 but annotated as 64 x 64",)
    (files.images / "1.png").write_bytes((files.images / "2.png").read_bytes()[:-30])  # cut off
    (files.images / "2.png").unlink()
    found = inspect(files)
    assert "1.png" in found[inspection.UNREADABLE_IMAGE].examples[0]
    assert found[inspection.MISSING_IMAGE].examples == ("2.png",)
    assert not training_can_start(found.values())


def test_cut_off_jpeg_is_found(files: CocoFiles) -> None:
    Image.effect_noise((SIDE, SIDE), 50).convert("RGB").save(files.images / "1.jpg")
    change(files, lambda c: c["images"][0].update(file_name="1.jpg"))
    assert inspect(files) == {}
    whole = (files.images / "1.jpg").read_bytes()
    (files.images / "1.jpg").write_bytes(whole[: len(whole) // 2])
    assert "1.jpg" in inspect(files)[inspection.UNREADABLE_IMAGE].examples[0]


def test_picture_is_measured_as_it_is_turned_by_exif(files: CocoFiles) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    Image.new("RGB", (SIDE, 40)).save(files.images / "1.png", exif=exif)
    change(files, lambda c: c["images"][0].update(width=40, height=SIDE))
    assert inspect(files) == {}


def test_tiny_and_extreme_pictures(files: CocoFiles) -> None:
    Image.new("RGB", (31, SIDE)).save(files.images / "1.png")
    Image.new("RGB", (SIDE, 8 * SIDE + 1)).save(files.images / "2.png")
    change(files, lambda c: c["images"][0].update(width=31))
    change(files, lambda c: c["images"][1].update(height=513))
    found = inspect(files)
    assert set(found) == {inspection.TINY_IMAGE, inspection.EXTREME_IMAGE}
    assert found[inspection.EXTREME_IMAGE].examples == ("2.png: 64 x 513",)


def test_more_objects_than_denoising_has_room_for(files: CocoFiles) -> None:
    def edit(content: Content) -> None:
        content["annotations"] += [
            {"id": 10 + i, "image_id": 1, "category_id": 1, "bbox": [i, 0, 5, 5]} | FINE for i in range(5)
        ]

    change(files, edit)  # six objects in the first image
    assert inspect(files, denoising(6, 12)) == {}
    found = inspect(files, denoising(5, 11))
    assert {kind.what: finding.examples for kind, finding in found.items()} == {
        "images with more than 5 objects (MODEL.DINO.DN.NUMBER)": ("1.png: 6",),
        "images with more than 5 objects (MODEL.DINO.DN.MAX_QUERIES)": ("1.png: 6",),
    }
    assert inspect(files, None) == {}


def test_unbounded_denoising_of_hundreds_of_objects_is_a_warning(
    files: CocoFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [
        {"id": 10 + i, "image_id": 1, "category_id": 1, "bbox": [i / 20, 0, 5, 5]}
        for i in range(inspection.MANY_OBJECTS)
    ]
    change(files, lambda c: c["annotations"].extend(boxes))
    assert inspection.MANY_QUERIES in inspect(files, denoising(1000, 0))
    assert inspection.MANY_QUERIES not in inspect(files, denoising(1000, 5000))


def test_file_without_a_box_cannot_be_trained_on(files: CocoFiles) -> None:
    change(files, lambda c: c["annotations"].clear())
    found = inspect(files)
    assert inspection.NO_OBJECTS in found
    assert found[inspection.EMPTY_IMAGE].count == 2


def test_boxes_without_area_are_nothing_to_learn(files: CocoFiles) -> None:
    change(files, lambda c: [entry.update(bbox=[4, 4, 0, 30]) for entry in c["annotations"]])
    assert inspection.NO_OBJECTS in inspect(files)


def test_image_ids_are_of_one_kind(files: CocoFiles) -> None:
    change(files, lambda c: c["images"].append(c["images"][0] | {"id": "second"}))
    assert inspect(files)[inspection.MIXED_IDS].examples == ("id 'second'",)


def test_errors_come_first_and_examples_are_few(files: CocoFiles) -> None:
    def edit(content: Content) -> None:
        content["categories"] += [{"id": i, "name": str(i)} for i in range(3, 9)]
        content["annotations"].append({"id": 9, "image_id": 1, "category_id": 1, "bbox": "none"} | FINE)

    change(files, edit)
    findings = inspect_dataset(files, None, LARGE)
    assert [finding.kind for finding in findings] == [inspection.NO_BOX, inspection.EMPTY_CATEGORY]
    assert findings[1].count == 6
    assert findings[1].examples == ("3", "4", "5")
