"""Annotation files are read as detectron2 reads them, without being in memory as a whole."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json

from dino_d2.data import coco
from dino_d2.data.coco import CocoRecords, stream_lists, stream_results

Content = dict[str, Any]
TRIANGLE, LINE = [[1, 1, 5, 1, 5.5, 5]], [[1, 1, 5, 1]]


def content() -> Content:
    """Everything that files hold: gaps in ids, crowds, all kinds of segmentation, annotations in any order, extras."""
    chance = random.Random(0)
    images = [
        {
            "id": 7 * i,
            "file_name": f"sub/é {i}.jpg",
            "width": 90 + i,
            "height": 100,
            "license": 4,
            "flickr_url": "x" * i,
        }
        for i in range(20)
    ]
    annotations = []
    for number in range(150):
        image = 7 * chance.choice([0, 1, 2, 3, 5, 6, 7, 12, 13, 19])
        box = [chance.randint(0, 20), chance.random() * 30, 20.5, 1e1]
        annotation = {
            "id": 1000 - 3 * number,
            "image_id": image,
            "category_id": chance.choice([90, 3, 17]),
            "bbox": box,
        }
        annotation |= {"area": box[2] * box[3], "attributes": {"occluded": [True, None, -1.5e-3]}}
        if number % 2:
            annotation["iscrowd"] = int(number % 9 == 0)
        rle = {"counts": [10, 20, 8970], "size": [100, 90]}
        segmentation = [None, [], TRIANGLE, LINE, rle, LINE + TRIANGLE][number % 7 - 1]
        if number % 7:
            annotation["segmentation"] = segmentation
        annotations.append(annotation)
    annotations[5] |= {"keypoints": [1, 2, 2], "num_keypoints": 1}
    annotations[6]["ignore"] = 0
    chance.shuffle(images)
    categories = [{"id": i, "name": f"class {i}", "supercategory": "none"} for i in (17, 90, 3, 4)]
    return {
        "info": {"year": 2017},
        "images": images,
        "licenses": [],
        "annotations": annotations,
        "categories": categories,
    }


def write(path: Path, content: object, **options: Any) -> str:
    path.write_text(json.dumps(content, **options), encoding="utf-8")
    return str(path)


def as_detectron2(path: str, name: str) -> list[dict]:
    records = load_coco_json(path, "images", name)
    for record in records:
        for annotation in record["annotations"]:
            annotation.pop("segmentation", None)
            annotation.pop("keypoints", None)
    return records


@pytest.mark.parametrize("chunk", [1, 7, 100, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_and_metadata_are_those_of_detectron2(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco, "CHUNK", chunk)
    path = write(tmp_path / "all.json", content(), indent=indent, ensure_ascii=False)
    ours, theirs = CocoRecords(path, "images", f"ours {tmp_path}"), as_detectron2(path, f"theirs {tmp_path}")
    assert len(ours) == 20
    assert list(ours) == theirs
    assert ours[-1] == theirs[-1]
    assert [list(map(type, a["bbox"])) for a in ours[1]["annotations"]] == [
        list(map(type, a["bbox"])) for a in theirs[1]["annotations"]
    ]
    assert any(a.get("iscrowd") for record in ours for a in record["annotations"])
    assert sum(len(record["annotations"]) for record in ours) < 150  # those without a valid polygon
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get(f"ours {tmp_path}").get(key) == MetadataCatalog.get(f"theirs {tmp_path}").get(key)


@pytest.mark.parametrize("field", ["iscrowd", "ignore"])
def test_null_is_as_if_it_were_missing(field: str, tmp_path: Path) -> None:
    """detectron2 would not train on an object whose "iscrowd" is null, but pycocotools evaluates it."""
    files = []
    for name, given in (("missing", {}), ("null", {field: None})):
        whole = content()
        whole["annotations"] = [{k: v for k, v in x.items() if k != field} | given for x in whole["annotations"]]
        files.append(write(tmp_path / f"{name}.json", whole))
    missing, null = (list(CocoRecords(file, "", str(file))) for file in files)
    assert null == missing


def test_order_of_the_lists_does_not_matter(tmp_path: Path) -> None:
    first = write(tmp_path / "first.json", content())
    second = write(tmp_path / "second.json", dict(reversed(content().items())))
    assert list(CocoRecords(first, "", f"a {tmp_path}")) == list(CocoRecords(second, "", f"b {tmp_path}"))


def test_image_ids_may_be_texts(tmp_path: Path) -> None:
    named = content()
    for image in named["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in named["annotations"]:
        annotation |= {"image_id": f"image {annotation['image_id']}", "id": str(annotation["id"])}
    path = write(tmp_path / "named.json", named)
    assert list(CocoRecords(path, "images", f"ours {tmp_path}")) == as_detectron2(path, f"theirs {tmp_path}")


def test_images_without_annotations_are_records_too(tmp_path: Path) -> None:
    images = content()
    del images["annotations"]
    path = write(tmp_path / "test-dev.json", images)
    ours = CocoRecords(path, "images", f"ours {tmp_path}")
    assert list(ours) == as_detectron2(path, f"theirs {tmp_path}")
    assert not ours.has_annotations


def changed(**values: Any) -> Callable[[Content], object]:
    return lambda c: c["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (changed(ignore=1), '"ignore" in COCO json file is not supported'),
        (changed(id=997), "not unique"),
        (changed(bbox=[]), "contains empty 'bbox'"),
        (changed(category_id=5), "category_id=5 but this id does not exist"),
    ],
)
def test_what_detectron2_refuses_is_refused(edit: Callable[[Content], object], message: str, tmp_path: Path) -> None:
    broken = content()
    edit(broken)
    path = write(tmp_path / "broken.json", broken)
    with pytest.raises(Exception, match=message) as theirs:
        load_coco_json(path, "images", f"theirs {tmp_path}")
    with pytest.raises(theirs.type, match=message):
        list(CocoRecords(path, "images", f"ours {tmp_path}"))


def test_annotations_of_images_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    stray = content()
    stray["annotations"].append(stray["annotations"][0] | {"image_id": 1, "ignore": 1})  # its id is used twice, too
    path = write(tmp_path / "stray.json", stray)
    assert list(CocoRecords(path, "images", f"ours {tmp_path}")) == as_detectron2(path, f"theirs {tmp_path}")


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
def test_lists_hold_what_json_says(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "CHUNK", chunk)
    values = {"a": [1, -2.5e-3, 1234567, 'x\\"é', None, True, [1, [2]], {"b": [3]}], "n": 12, "o": {"a": [9]}, "e": []}
    path = write(tmp_path / "values.json", values)
    assert {name: list(entries) for name, entries in stream_lists(path)} == {"a": values["a"], "e": []}
    assert [name for name, _ in stream_lists(path)] == ["a", "e"]  # what is not asked for is passed over


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("values", [[], [{"image_id": 1, "bbox": [1, 2.5, 3, 4e1]}, {"score": 0.25}]])
def test_results_are_read_one_by_one(values: list, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "CHUNK", chunk)
    assert list(stream_results(write(tmp_path / "results.json", values))) == values


@pytest.mark.parametrize("chunk", [1, 2**20])
def test_a_byte_order_mark_is_skipped(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "CHUNK", chunk)
    (tmp_path / "lists.json").write_text('{"a": [1, "é"]}', encoding="utf-8-sig")
    (tmp_path / "results.json").write_text('[1, "é"]', encoding="utf-8-sig")
    assert [(name, list(entries)) for name, entries in stream_lists(str(tmp_path / "lists.json"))] == [("a", [1, "é"])]
    assert list(stream_results(tmp_path / "results.json")) == [1, "é"]


@pytest.mark.parametrize(("text", "place"), [("", 0), ('{"a": []}', 0), ("[{}", 3), ("[{},]", 4), ("[] x", 3)])
def test_results_that_are_no_list_are_named(text: str, place: int, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json is not JSON: .* at character {place}$"):
        list(stream_results(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", 0), ("{", 1), ('{"a": [1, 2', 11), ('{"a": [1 2]}', 9), ('{"a": [1,]}', 9), ('{"a" [1]}', 5), ("{1", 2),
        ('{"a": [{"b": }]}', 13), ('{"a": []} x', 10), ('{"a": [], }', 10),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 2**20])
def test_what_is_not_json_is_named_with_the_place(
    text: str, place: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coco, "CHUNK", chunk)
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json is not JSON: .* at character {place}$"):
        list(stream_lists(str(tmp_path / "bad.json")))  # which reads the entries, too


def test_text_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('{"a": ["é"]}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json is not JSON: .*utf-8"):
        list(stream_lists(str(tmp_path / "latin.json")))


def test_large_file_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "CHUNK", 2**16)
    large = content()
    outline = {"id": 1, "image_id": 1, "segmentation": [[123.25] * 1000], "category_id": 3, "bbox": [1, 2, 3, 4]}
    large["annotations"] = [copy.copy(outline) for _ in range(500)]  # 4 MB
    path = write(tmp_path / "large.json", large)
    assert Path(path).stat().st_size > 4e6
    tracemalloc.start()
    for _, entries in stream_lists(path):
        for _ in entries:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
