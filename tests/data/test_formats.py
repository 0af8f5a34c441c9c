"""A folder is found out: COCO's, Roboflow's, YOLO's and Pascal VOC's layouts, and what is none of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dino_d2.data import CocoFiles, FoundDataset, find_dataset
from dino_d2.data.inspection import (
    BROKEN_ANNOTATION,
    BROKEN_IMAGE_ENTRY,
    OTHER_SIZE,
    REPEATED_IMAGE_ID,
    UNKNOWN_IMAGE,
    Kind,
    inspect_dataset,
    training_can_start,
)

SIZE = (64, 48)  # width, height
BOX = (8, 6, 40, 30)  # x1, y1, x2, y2
NAMES = ["cat", "dog"]


def picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def coco(file: Path, names: list[str], dummy: bool = False) -> Path:
    """An object of each class in turn; the last image has none."""
    width, height = BOX[2] - BOX[0], BOX[3] - BOX[1]
    common = {"bbox": [BOX[0], BOX[1], width, height], "area": width * height, "iscrowd": 0}
    images = [{"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]} for i, name in enumerate(names)]
    annotations = [{"id": i + 1, "image_id": i, "category_id": i % 2 + 1} | common for i in range(len(names) - 1)]
    categories = [{"id": i, "name": name, "supercategory": "pets"} for i, name in enumerate(NAMES, start=1)]
    if dummy:
        categories.insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def label(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def yolo_line(number: int) -> str:
    """BOX, of that class."""
    width, height = SIZE
    x, y = (BOX[0] + BOX[2]) / 2 / width, (BOX[1] + BOX[3]) / 2 / height
    return f"{number} {x:.6f} {y:.6f} {(BOX[2] - BOX[0]) / width:.6f} {(BOX[3] - BOX[1]) / height:.6f}"


def xml(path: Path, *objects: str, difficult: int = 0, size: tuple[object, object] | None = None) -> None:
    """BOX for each class, in the devkit's numbers, which count pixels from 1. size: what the file gives as its own."""
    sides = f"<xmin>{BOX[0] + 1}</xmin><ymin>{BOX[1] + 1}</ymin><xmax>{BOX[2]}</xmax><ymax>{BOX[3]}</ymax>"
    inside = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"
        for name in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if size:
        inside = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>{inside}"
    path.write_text(f"<annotation><filename>wrong.jpg</filename>{inside}</annotation>")


def yolo(folder: Path, train: str, val: str | None, entries: dict, names: object = NAMES) -> Path:
    """Two images with an object and one without a label file in each part."""
    for part, place in (("train", train), ("val", val)):
        for i in range(3 if place else 0):
            path = picture(folder / place / f"{part}_{i}.png")
            if i < 2:
                label(folder / place.replace("images", "labels") / f"{part}_{i}.txt", yolo_line(i))
            assert path.is_file()
    (folder / "data.yaml").write_text(yaml.safe_dump({"names": names, **entries}))
    return folder


def content_of(files: CocoFiles) -> dict:
    return json.loads(files.annotations.read_text())


def check(files: CocoFiles, images: int, objects: int) -> None:
    """The box is where it was drawn, the classes are numbered by name, nothing is wrong with it."""
    content = content_of(files)
    assert (len(content["images"]), len(content["annotations"])) == (images, objects)
    assert [entry["name"] for entry in content["categories"]] == NAMES
    for entry in content["annotations"]:
        assert entry["bbox"] == pytest.approx([BOX[0], BOX[1], BOX[2] - BOX[0], BOX[3] - BOX[1]], abs=0.02)
    assert training_can_start(inspect_dataset(files, None, (800, 1333)))


def findings_of(found: FoundDataset) -> dict[Kind, list[str]]:
    """Examples of each kind of finding, in both parts."""
    examples = defaultdict(list)
    for part in (found.train, found.val):
        for finding in inspect_dataset(part, None, (800, 1333)):
            examples[finding.kind] += finding.examples
    return examples


# --- COCO


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/instances_{}.json", "images"),
        ("{}.json", "{}"),
        ("{}.json", "images/{}"),
    ],
)
def test_coco_is_used_as_it_is(tmp_path: Path, annotations: str, images: str) -> None:
    for part in ("train", "val"):
        names = [f"{part}_{i}.png" for i in range(3)]
        coco(tmp_path / annotations.format(part), names)
        for name in names:
            picture(tmp_path / images.format(part) / name)
    found = find_dataset(tmp_path, tmp_path / "out")
    assert found.layout == "COCO"
    for part, files in (("train", found.train), ("val", found.val)):
        assert files == CocoFiles(tmp_path / annotations.format(part), tmp_path / images.format(part))
        check(files, images=3, objects=2)
    assert not (tmp_path / "out").exists()


def roboflow_coco(folder: Path, *parts: str) -> Path:
    for part in parts:
        names = [f"{part}_{i}.png" for i in range(3)]
        coco(folder / part / "_annotations.coco.json", names, dummy=True)
        for name in names:
            picture(folder / part / name)
    return folder


def test_roboflows_dummy_category_is_left_out_and_its_test_part_left_alone(tmp_path: Path) -> None:
    found = find_dataset(roboflow_coco(tmp_path, "train", "valid", "test"), tmp_path / "out")
    check(found.train, images=3, objects=2)
    check(found.val, images=3, objects=2)
    assert found.val == CocoFiles(tmp_path / "out" / "val.json", tmp_path / "valid")
    assert any('category 0, "pets"' in note for note in found.notes)
    assert any("test" in note and "not used" in note for note in found.notes)


def test_a_category_0_that_has_objects_stays(tmp_path: Path) -> None:
    roboflow_coco(tmp_path, "train", "valid")
    file = tmp_path / "train" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    found = find_dataset(tmp_path, tmp_path / "out")
    assert found.train.annotations == file


def test_several_annotation_files_of_a_part_are_not_chosen_from(tmp_path: Path) -> None:
    for year in (2014, 2017):
        coco(tmp_path / "annotations" / f"instances_train{year}.json", ["a.png"])
    with pytest.raises(ValueError, match=r"instances_train2014\.json, instances_train2017\.json.*--train-json"):
        find_dataset(tmp_path, tmp_path / "out")


def test_images_that_are_nowhere_are_named(tmp_path: Path) -> None:
    coco(tmp_path / "train.json", ["a.png", "b.png"])
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a\.png not found in any of .*train"):
        find_dataset(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_gets_no_byte_order_mark(tmp_path: Path, training: bool) -> None:
    for part in ("train", "val"):
        file = coco(tmp_path / f"{part}.json", ["a.png", "b.png", "c.png"])
        file.write_text(file.read_text(), encoding="utf-8-sig")
        for name in ("a.png", "b.png", "c.png"):
            picture(tmp_path / part / name)
    found = find_dataset(tmp_path, tmp_path / "out", training=training)
    assert found.val.annotations == tmp_path / "out" / "val.json"
    check(found.val, images=3, objects=2)
    if training:
        assert found.train.annotations == tmp_path / "train.json"
        assert training_can_start(inspect_dataset(found.train, None, (800, 1333)))


# --- YOLO


@pytest.mark.parametrize(
    ("train", "val", "entries"),
    [
        ("images/train", "images/val", {"train": "images/train", "val": "images/val"}),
        ("images/train", "images/val", {"path": ".", "train": "images/train", "val": "images/val"}),
        ("images/train", "images/val", {"path": "../datasets/pets", "train": "images/train", "val": "images/val"}),
        ("images/train", "images/val", {"train": "/content/pets/images/train", "val": "/content/pets/images/val"}),
        ("train/images", "valid/images", {"train": "../train/images", "val": "../valid/images"}),
        ("train/images", "valid/images", {"train": ["train/images"], "val": ["valid/images"]}),
    ],
)
def test_yolo_in_ultralytics_and_roboflows_layout(tmp_path: Path, train: str, val: str, entries: dict) -> None:
    found = find_dataset(yolo(tmp_path / "pets", train, val, entries), tmp_path / "out")
    assert found.layout == "YOLO"
    check(found.train, images=3, objects=2)
    check(found.val, images=3, objects=2)
    assert (found.train.images, found.val.images) == (tmp_path / "pets" / train, tmp_path / "pets" / val)
    assert found.train.annotations == tmp_path / "out" / "train.json"


def test_yolos_paths_do_not_lead_to_a_neighbour_of_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "images" / "other.png")
    folder = yolo(tmp_path / "pets", "train/images", None, {"train": "../train/images"})
    found = find_dataset(folder, tmp_path / "out")
    assert found.train.images == folder / "train" / "images"


@pytest.mark.parametrize("path", [None, "../elsewhere"])
def test_yolos_labels_are_sought_below_the_dataset_alone(tmp_path: Path, path: str | None) -> None:
    """Not in a sister of a folder `images` that holds the whole dataset."""
    inside = tmp_path / "images" / ("elsewhere" if path else "pets")
    for part in ("train", "val"):
        for i in range(2):
            picture(inside / part / f"{part}_{i}.png")
            label(inside / part / f"{part}_{i}.txt", yolo_line(i))
    folder = tmp_path / "images" / "pets"
    folder.mkdir(exist_ok=True)
    entries = {"names": NAMES, "train": "train", "val": "val"} | ({"path": path} if path else {})
    (folder / "data.yaml").write_text(yaml.safe_dump(entries))
    check(find_dataset(folder, tmp_path / "out").train, images=2, objects=2)


def test_yolos_names_may_be_a_dictionary_and_its_objects_polygons(tmp_path: Path) -> None:
    entries = {"train": "images/train", "val": "images/val"}
    yolo(tmp_path, "images/train", "images/val", entries, names={1: "dog", 0: "cat"})
    corners = [(BOX[i] / SIZE[0], BOX[j] / SIZE[1]) for i, j in ((0, 1), (2, 1), (2, 3), (0, 3))]
    label(tmp_path / "labels" / "train" / "train_0.txt", "0 " + " ".join(f"{x:.6f} {y:.6f}" for x, y in corners))
    check(find_dataset(tmp_path, tmp_path / "out").train, images=3, objects=2)


@pytest.mark.parametrize("names", ["[no, 007]", "{0: no, 1: 007}"])
def test_yolos_names_are_as_written(tmp_path: Path, names: str) -> None:
    yolo(tmp_path, "images/train", "images/val", {})
    label(tmp_path / "data.yaml", "train: images/train", "val: images/val", f"names: {names}")
    found = find_dataset(tmp_path, tmp_path / "out")
    assert [entry["name"] for entry in content_of(found.train)["categories"]] == ["no", "007"]


def test_yolos_keypoints_are_left_out(tmp_path: Path) -> None:
    entries = {"train": "images/train", "val": "images/val", "kpt_shape": [3, 2]}
    yolo(tmp_path, "images/train", "images/val", entries)
    label(tmp_path / "labels" / "train" / "train_0.txt", f"{yolo_line(0)} 0.9 0.9 0 0 0.01 0.99")
    check(find_dataset(tmp_path, tmp_path / "out").train, images=3, objects=2)


def in_latin_1(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="latin-1")


def with_mark(path: Path) -> None:
    path.write_text(path.read_text(), encoding="utf-8-sig")


def test_yolos_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    folder = yolo(tmp_path, "images/train", "images/val", {"train": "images/train", "val": "images/val"})
    for path in (folder / "data.yaml", *folder.rglob("*.txt")):
        with_mark(path)
    (folder / "images" / "train" / "train_1.png").rename(folder / "images" / "train" / "train_1.heic")
    found = find_dataset(folder, tmp_path / "out")
    check(found.val, images=3, objects=2)
    assert any("train_1.txt" in note for note in found.notes)


def test_yolos_pictures_are_measured_as_they_are_seen(tmp_path: Path) -> None:
    folder = yolo(tmp_path, "images/train", "images/val", {"train": "images/train", "val": "images/val"})
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", SIZE).save(folder / "images" / "train" / "train_2.png", exif=exif)
    files = find_dataset(folder, tmp_path / "out").train
    assert [(x["width"], x["height"]) for x in content_of(files)["images"]] == [SIZE, SIZE, SIZE[::-1]]
    assert training_can_start(inspect_dataset(files, None, (800, 1333)))


def test_yolos_labels_without_an_image_are_reported(tmp_path: Path) -> None:
    folder = yolo(tmp_path, "images/train", "images/val", {"train": "images/train", "val": "images/val"})
    picture(folder / "images" / "train" / "train_1.png").rename(folder / "images" / "train" / "train_1.jfif")
    check(find_dataset(folder, tmp_path / "out").train, images=3, objects=2)
    (folder / "images" / "train" / "train_1.jfif").rename(folder / "images" / "train" / "train_1.heic")
    label(folder / "labels" / "train" / "empty.txt", "")
    label(folder / "labels" / "train" / "classes.txt", *NAMES)
    found = find_dataset(folder, tmp_path / "out")
    (note,) = found.notes
    assert note.startswith("label files with objects, but without an image")
    assert note.endswith(f"): 1, such as {folder / 'labels' / 'train' / 'train_1.txt'}; not used")
    assert found.counts == (2, 3)


def test_yolos_labels_beside_the_images_are_those_of_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        picture(tmp_path / part / "sub" / "a.png")
        label(tmp_path / part / "sub" / "a.txt", yolo_line(1))
    label(tmp_path / "val" / "sub" / "b.txt", yolo_line(1))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"names": NAMES, "train": "train", "val": "val"}))
    (note,) = find_dataset(tmp_path, tmp_path / "out").notes
    assert "val/sub/b.txt" in note


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: label(folder / "labels" / "train" / "train_0.txt", "2 0.5 0.5 0.1 0.1"),
            "train_0.txt.*class 2",
        ),
        (lambda folder: label(folder / "labels" / "train" / "train_0.txt", "0 0.5 0.5"), "train_0.txt"),
        (
            lambda folder: (folder / "labels" / "train" / "train_0.txt").write_text(yolo_line(0), encoding="utf-16"),
            r"train_0\.txt is not a text file in UTF-8",
        ),
        (lambda folder: label(folder / "data.yaml", "train: images/train"), "names"),
        (lambda folder: label(folder / "data.yaml", "names: [cat, dog]"), "does not give .train"),
        (lambda folder: label(folder / "data.yaml", "names: [cat, dog]", "train: photos"), "train is photos"),
        (lambda folder: label(folder / "data.yaml", "names: [cat"), "not YAML"),
        (lambda folder: (folder / "labels").rename(folder / "marks"), "no image has a label file.*labels.train"),
        (lambda folder: [p.unlink() for p in folder.rglob("*.png")], "no images found"),
        (lambda folder: label(folder / "images" / "train" / "x.jpg", "no image"), "x.jpg"),
        (
            lambda folder: picture(folder / "images" / "train" / "train_1.jpg"),
            r"images.train: train_1\.jpg and train_1\.png would share .*train_1\.txt",
        ),
        (lambda folder: cut_off(folder / "images" / "train" / "train_1.png"), "train_1.png"),
    ],
)
def test_yolos_faults_are_named(tmp_path: Path, change, message: str) -> None:
    folder = yolo(tmp_path, "images/train", "images/val", {"train": "images/train", "val": "images/val"})
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_dataset(folder, tmp_path / "out")


# --- Pascal VOC


def test_voc_devkits_lists_divide_it(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / "JPEGImages" / f"{i}.jpg")
        if i not in (2, 5):
            xml(tmp_path / "Annotations" / f"{i}.xml", NAMES[1 - i % 2])  # dog comes first: classes are sorted
    for name, ids in (("train", "0\n1\n2\n"), ("val", "3\n4\n"), ("test", "5\n"), ("cat_train", "0 1\n1 -1\n")):
        label(tmp_path / "ImageSets" / "Main" / f"{name}.txt", ids.strip())
    found = find_dataset(tmp_path, tmp_path / "out")
    assert found.layout == "Pascal VOC"
    check(found.train, images=3, objects=2)
    check(found.val, images=2, objects=2)
    assert [x["file_name"] for x in content_of(found.val)["images"]] == ["3.jpg", "4.jpg"]
    assert any("test" in note for note in found.notes)


@pytest.mark.parametrize(
    ("lists", "train"),
    [({}, {"2.jpg", "4.jpg"}), ({"trainval": "0 1 3 4"}, {"4.jpg"}), ({"test": "2 elsewhere"}, {"4.jpg"})],
)
def test_what_vocs_other_lists_leave_is_for_training(tmp_path: Path, lists: dict, train: set[str]) -> None:
    voc(tmp_path, count=5)
    for name, ids in (lists | {"val": "0 1 3"}).items():
        label(tmp_path / "ImageSets" / "Main" / f"{name}.txt", *ids.split())
    found = find_dataset(tmp_path, tmp_path / "out")
    assert names_of(found.val) == {"0.jpg", "1.jpg", "3.jpg"}
    assert names_of(found.train) == train


def test_vocs_lists_may_have_spaces_marks_and_values(tmp_path: Path) -> None:
    names = ["my photo 0", "my photo", "plain", "other"]
    for name in names:
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        xml(tmp_path / "Annotations" / f"{name}.xml", *NAMES)
    lists = tmp_path / "ImageSets" / "Main"
    label(lists / "train.txt", "my photo 0", "my photo  1", "plain -1 ")
    label(lists / "val.txt", "other 0", "", "plain")
    for path in lists.iterdir():
        with_mark(path)
    found = find_dataset(tmp_path, tmp_path / "out")
    assert names_of(found.train) == {"my photo 0.jpg", "my photo.jpg", "plain.jpg"}
    assert names_of(found.val) == {"other.jpg", "plain.jpg"}


def test_voc_beside_the_images_as_roboflow_has_it(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        for i in range(3):
            picture(tmp_path / part / f"{part}_{i}.png")
            xml(tmp_path / part / f"{part}_{i}.xml", *([NAMES[i]] if i < 2 else []))
    found = find_dataset(tmp_path, tmp_path / "out")
    check(found.train, images=3, objects=2)
    check(found.val, images=3, objects=2)


def test_spaces_around_vocs_names_make_no_class(tmp_path: Path) -> None:
    xml(voc(tmp_path) / "Annotations" / "1.xml", " cat\n", "dog")
    content = content_of(find_dataset(tmp_path, tmp_path / "out").train)
    assert [entry["name"] for entry in content["categories"]] == NAMES


def test_difficult_objects_are_trained_on_and_forgiven(tmp_path: Path) -> None:
    """As detectron2's loader and its evaluator of Pascal VOC have it."""
    for part in ("train", "valid"):
        for i in range(2):
            picture(tmp_path / part / f"{i}.png")
            xml(tmp_path / part / f"{i}.xml", *NAMES, difficult=i)
    found = find_dataset(tmp_path, tmp_path / "out")
    assert [x["iscrowd"] for x in content_of(found.train)["annotations"]] == [0, 0, 0, 0]
    assert [x["iscrowd"] for x in content_of(found.val)["annotations"]] == [0, 0, 1, 1]
    assert any("difficult" in note for note in found.notes)


def voc(folder: Path, count: int = 3) -> Path:
    """The devkit's folders, without lists."""
    for i in range(count):
        picture(folder / "JPEGImages" / f"{i}.jpg")
        xml(folder / "Annotations" / f"{i}.xml", "cat")
    return folder


@pytest.mark.parametrize("size", [(4032, 3024), SIZE[::-1], ("640.0", "480.0")])
def test_vocs_boxes_of_another_version_of_the_image_are_found(tmp_path: Path, size: tuple) -> None:
    """Of the image before it was made smaller, or before a quarter turn that EXIF data ask for."""
    xml(voc(tmp_path) / "Annotations" / "1.xml", "cat", size=size)
    width, height = map(round, map(float, size))
    examples = findings_of(find_dataset(tmp_path, tmp_path / "out"))[OTHER_SIZE]
    assert examples == [f"1.jpg: {SIZE[0]} x {SIZE[1]} but annotated as {width} x {height}"]


@pytest.mark.parametrize("size", [SIZE, (0, 0), (0, 48), ("", ""), ("nan", "nan"), ("inf", 48)])
def test_vocs_size_need_not_be_known(tmp_path: Path, size: tuple) -> None:
    xml(voc(tmp_path) / "Annotations" / "1.xml", "cat", size=size)
    assert OTHER_SIZE not in findings_of(find_dataset(tmp_path, tmp_path / "out"))


def test_vocs_annotations_without_an_image_are_reported(tmp_path: Path) -> None:
    voc(tmp_path, 5)
    for i in (0, 1):
        (tmp_path / "JPEGImages" / f"{i}.jpg").rename(tmp_path / "JPEGImages" / f"{i}.heic")
    xml(tmp_path / "Annotations" / "without_objects.xml")
    notes = find_dataset(tmp_path, tmp_path / "out").notes
    (note,) = (note for note in notes if "held out" not in note)
    assert note.startswith("XML files with objects, but without an image")
    assert note.endswith(f"): 2, such as {tmp_path / 'Annotations' / '0.xml'}; not used")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: picture(folder / "JPEGImages" / "1.png"), r"JPEGImages.*1\.jpg and 1\.png"),
        (lambda folder: xml(folder / "Annotations" / "0.xml", "cat", size=("wide", "high")), "0.xml.*wide"),
        (lambda folder: label(folder / "Annotations" / "0.xml", "<annotation>"), "0.xml"),
        (lambda folder: xml(folder / "Annotations" / "0.xml", " "), "0.xml.*name"),
        (lambda folder: label(folder / "Annotations" / "0.xml", "<annotation><object/></annotation>"), "0.xml"),
        (lambda folder: label(folder / "ImageSets" / "Main" / "train.txt", "0", "9"), "names 9"),
        (lambda folder: label(folder / "ImageSets" / "Main" / "train.txt", "0", "my photo 9"), "names my photo 9"),
        (lambda folder: label(folder / "ImageSets" / "Main" / "val.txt", "0", "1", "2"), "leave no image for training"),
        (
            lambda folder: in_latin_1(folder / "ImageSets" / "Main" / "train.txt", "café"),
            r"train\.txt is not a text file in UTF-8",
        ),
        (
            lambda folder: [p.rename(p.with_name("x" + p.name)) for p in folder.rglob("*.xml")],
            "no annotations of",
        ),
        (lambda folder: [xml(p) for p in folder.rglob("*.xml")], "annotations have no objects"),
    ],
)
def test_vocs_faults_are_named(tmp_path: Path, change, message: str) -> None:
    change(voc(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_dataset(tmp_path, tmp_path / "out")


# --- all of them


def names_of(files: CocoFiles) -> set[str]:
    return {image["file_name"] for image in content_of(files)["images"]}


def test_a_fifth_is_held_back_where_nothing_is_to_evaluate_on(tmp_path: Path) -> None:
    names = [f"{i // 2:02}_jpg.rf.{i:032x}.png" for i in range(40)]  # 20 photographs, two copies of each
    coco(tmp_path / "train.json", names)
    for name in names:
        picture(tmp_path / "train" / name)
    found = find_dataset(tmp_path, tmp_path / "one")
    train, val = names_of(found.train), names_of(found.val)
    assert (found.counts, len(train), len(val)) == ((32, 8), 32, 8)
    assert train | val == set(names)
    assert all(count == 2 for count in Counter(name[:2] for name in val).values())
    assert any("held out" in note for note in found.notes)
    assert names_of(find_dataset(tmp_path, tmp_path / "two").val) == val
    inside = {image["id"] for image in content_of(found.val)["images"]}
    assert {entry["image_id"] for entry in content_of(found.val)["annotations"]} <= inside


def without_objects(file: Path, images: Collection[int]) -> None:
    """Remove the annotations of these images."""
    content = json.loads(file.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] not in images]
    file.write_text(json.dumps(content))


def test_both_parts_get_images_with_and_without_objects(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(21)]
    file = coco(tmp_path / "train.json", names)
    for name in names:
        picture(tmp_path / "train" / name)
    with_all = names_of(find_dataset(tmp_path, tmp_path / "one").val)
    first = sorted(names[:20], key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert with_all == set(first[:4])  # of 20 with objects; the only one without stays in training
    without_objects(file, [names.index(name) for name in first[:10]])
    found = find_dataset(tmp_path, tmp_path / "two")
    inside = {entry["image_id"] for entry in content_of(found.val)["annotations"]}
    assert (found.counts, len(inside)) == ((17, 4), 2)


def test_images_with_objects_are_held_back_only_if_there_are_two(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(10)]
    file = coco(tmp_path / "train.json", names)
    for name in names:
        picture(tmp_path / "train" / name)
    without_objects(file, range(2, 10))
    found = find_dataset(tmp_path, tmp_path / "two")
    assert [len(content_of(files)["annotations"]) for files in (found.train, found.val)] == [1, 1]
    without_objects(file, range(1, 10))
    with pytest.raises(ValueError, match="only one image with objects"):
        find_dataset(tmp_path, tmp_path / "one")


def test_an_evaluation_holds_nothing_back(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(10)]
    coco(tmp_path / "train.json", names)
    for name in names:
        picture(tmp_path / "train" / name)
    found = find_dataset(tmp_path, tmp_path / "out", training=False)
    assert found.train is None
    assert found.val == CocoFiles(tmp_path / "train.json", tmp_path / "train")
    assert found.counts == (0, 10)
    (note,) = found.notes
    assert "all 10 images are evaluated on" in note


def coco_of_val(folder: Path) -> None:
    names = [picture(folder / "val" / f"{i}.png").name for i in range(3)]
    coco(folder / "val.json", names)


def yolo_of_val(folder: Path) -> None:
    entries = {"train": "../train/images", "val": "../valid/images", "test": "../test/images"}
    yolo(folder, "train/images", "valid/images", entries)
    shutil.rmtree(folder / "train")


def voc_of_val(folder: Path) -> None:
    for i in range(3):
        picture(folder / "valid" / f"{i}.png")
        xml(folder / "valid" / f"{i}.xml", *([NAMES[i]] if i < 2 else []))


def voc_listed_val(folder: Path) -> None:
    for i in range(5):
        picture(folder / "JPEGImages" / f"{i}.jpg")
        xml(folder / "Annotations" / f"{i}.xml", *([NAMES[i]] if i < 2 else []))
    label(folder / "ImageSets" / "Main" / "val.txt", "0", "1", "2")


@pytest.mark.parametrize(
    ("make", "trainable"),
    [
        (coco_of_val, False),
        (lambda folder: roboflow_coco(folder, "valid"), False),
        (yolo_of_val, False),
        (voc_of_val, False),
        (voc_listed_val, True),
    ],
)
def test_an_evaluation_needs_nothing_to_train_on(tmp_path: Path, make: Callable, trainable: bool) -> None:
    make(tmp_path)
    found = find_dataset(tmp_path, tmp_path / "out", training=False)
    assert (found.train, found.counts) == (None, (0, 3))
    check(found.val, images=3, objects=2)
    assert not (tmp_path / "out" / "train.json").exists()
    if not trainable:
        with pytest.raises((ValueError, FileNotFoundError)):
            find_dataset(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("entry", [{}, {"test": "images/test"}, {"val": "photos"}])
def test_yolos_file_must_give_something_to_evaluate_on(tmp_path: Path, entry: dict) -> None:
    yolo(tmp_path, "images/train", None, entry)
    with pytest.raises(ValueError, match='does not give "val" or "train"'):
        find_dataset(tmp_path, tmp_path / "out", training=False)


def test_faulty_entries_survive_the_division_and_are_found(tmp_path: Path) -> None:
    file = coco(tmp_path / "train.json", [f"{i}.png" for i in range(10)])
    content = json.loads(file.read_text())
    for key, entry in zip(("id", "file_name", "width"), content["images"], strict=False):
        del entry[key]
    file.write_text(json.dumps(content))
    for i in range(10):
        picture(tmp_path / "train" / f"{i}.png")
    found = find_dataset(tmp_path, tmp_path / "out")
    assert sum(found.counts) == 10
    assert len(findings_of(found)[BROKEN_IMAGE_ENTRY]) == 3


@pytest.mark.parametrize(
    ("change", "kind", "count"),
    [
        (
            lambda content: [entry.update(image_id=1.0 * entry["image_id"]) for entry in few(content)],
            BROKEN_ANNOTATION,
            3,
        ),
        (lambda content: [entry.pop("image_id") for entry in few(content)], BROKEN_ANNOTATION, 3),
        (lambda content: [entry.update(image_id=[1]) for entry in few(content)], BROKEN_ANNOTATION, 3),
        (lambda content: [entry.update(image_id=str(entry["image_id"])) for entry in few(content)], UNKNOWN_IMAGE, 3),
        (lambda content: [entry.update(id=7) for entry in content["images"][6:9]], REPEATED_IMAGE_ID, 2),
    ],
)
def test_faulty_ids_survive_the_division_and_are_found(
    tmp_path: Path, change: Callable, kind: Kind, count: int
) -> None:
    names = [f"{i}.png" for i in range(10)]
    file = coco(tmp_path / "train.json", names)
    for name in names:
        picture(tmp_path / "train" / name)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    assert len(findings_of(find_dataset(tmp_path, tmp_path / "out"))[kind]) == count


def few(content: dict) -> list[dict]:
    return content["annotations"][:3]


def test_names_in_another_encoding_are_divided(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)] + [os.fsdecode(b"caf\xe9.png"), "lone \ud800.png"]
    coco(tmp_path / "train.json", names)
    for name in names[:-1]:
        picture(tmp_path / "train" / name)
    found = find_dataset(tmp_path, tmp_path / "out")
    assert names_of(found.train) | names_of(found.val) == set(names)


def test_a_single_photograph_cannot_be_divided(tmp_path: Path) -> None:
    coco(tmp_path / "train.json", ["a.png"])
    picture(tmp_path / "train" / "a.png")
    with pytest.raises(ValueError, match="only one image"):
        find_dataset(tmp_path, tmp_path / "out")


def test_other_folders_are_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    picture(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"photo\.png.*none of the supported layouts") as caught:
        find_dataset(tmp_path, tmp_path / "out")
    assert all(word in str(caught.value) for word in ("instances_train", "_annotations.coco.json", "data.yaml", "XML"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_dataset(tmp_path / "nowhere", tmp_path / "out")


def test_annotations_of_a_run_are_not_replaced_by_others(tmp_path: Path) -> None:
    folder = roboflow_coco(tmp_path / "data", "train", "valid")
    find_dataset(folder, tmp_path / "out")
    find_dataset(folder, tmp_path / "out", may_replace=False)
    coco(folder / "train" / "_annotations.coco.json", ["train_0.png"], dummy=True)
    with pytest.raises(FileExistsError, match=r"train\.json is from different data"):
        find_dataset(folder, tmp_path / "out", may_replace=False)
    assert find_dataset(folder, tmp_path / "out").counts == (1, 3)


def test_annotations_are_not_written_into_the_data(tmp_path: Path) -> None:
    for part in ("train", "val"):
        coco(tmp_path / f"{part}.json", ["a.png", "b.png"])
        for name in ("a.png", "b.png"):
            picture(tmp_path / part / name)
    find_dataset(tmp_path, tmp_path)  # nothing is to be written
    file = tmp_path / "val.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    before = (tmp_path / "val.json").read_text()
    with pytest.raises(ValueError, match="holds the data: choose another folder"):
        find_dataset(tmp_path, tmp_path / "train" / "..")
    assert (tmp_path / "val.json").read_text() == before


def test_without_supervision_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yolo(tmp_path, "images/train", None, {"train": "images/train"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        find_dataset(tmp_path, tmp_path / "out")
