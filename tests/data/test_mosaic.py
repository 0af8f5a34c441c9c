"""Images joined with others: where they lie, where their objects are then, and that a batch can be had again."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from dino_d2 import load_config
from dino_d2.data import (
    ImageMapper,
    TrainingLoader,
    build_train_augmentation,
    build_train_loader,
    contact_sheet,
    register_datasets,
)
from dino_d2.data.mosaic import layout, mosaic
from dino_d2.engine.choices import _most_objects
from tests.synthetic import config_values, write_rectangles

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml")
SIZES = [(240, 320), (320, 240), (200, 200), (132, 284)]  # height, width


def image_with_object(number: int, size: tuple[int, int]) -> tuple[np.ndarray, dict]:
    """Grey, with one rectangle of the number's own colour."""
    image = np.full((*size, 3), 128, np.uint8)
    x, y, width, height = [40, 48, 120, 60] if number % 2 else [24, 32, 140, 70]
    image[y : y + height, x : x + width] = 20 * number
    box, mode = [x, y, width, height], BoxMode.XYWH_ABS
    if number % 2:
        box, mode = [x, y, x + width, y + height], BoxMode.XYXY_ABS
    return image, {"bbox": box, "bbox_mode": mode, "category_id": number, "iscrowd": 0}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("first", range(4))
def test_objects_are_where_their_boxes_say(count: int, first: int) -> None:
    order = [*range(first, 4), *range(first)][:count]
    parts = [image_with_object(number, SIZES[number]) for number in order]
    joined, found = mosaic([image for image, _ in parts], [[annotation] for _, annotation in parts])
    assert [annotation["category_id"] for annotation in found] == order
    for annotation in found:
        assert annotation["bbox_mode"] == BoxMode.XYXY_ABS
        x1, y1, x2, y2 = annotation["bbox"]
        inside = joined[round(y1) + 2 : round(y2) - 2, round(x1) + 2 : round(x2) - 2]
        assert abs(inside.astype(int) - 20 * annotation["category_id"]).max() <= 1
        around = joined[[int(y1) - 3, int(y2) + 3], int(x1 + x2) // 2]
        assert (around >= 100).all()  # grey again: the box ends where the object ends


def test_the_annotations_given_stay_as_they_are() -> None:
    parts = [image_with_object(number, SIZES[number]) for number in range(2)]
    before = [dict(annotation) for _, annotation in parts]
    mosaic([image for image, _ in parts], [[annotation] for _, annotation in parts])
    assert [annotation for _, annotation in parts] == before


@pytest.mark.parametrize("count", [2, 4])
def test_images_fill_the_mosaic_in_their_own_shape(count: int) -> None:
    for order in itertools.permutations(range(4), count):
        sizes = [SIZES[number] for number in order]
        places = layout(sizes)
        painted = np.zeros((places[-1][3], places[-1][2]), int)
        for (height, width), (x1, y1, x2, y2) in zip(sizes, places, strict=True):
            painted[y1:y2, x1:x2] += 1
            assert (x2 - x1) / (y2 - y1) == pytest.approx(width / height, rel=0.03)
        assert (painted == 1).all()
        assert painted.size == pytest.approx(max(height * width for height, width in sizes), rel=0.03)


@pytest.mark.parametrize("sizes", [[(1, 1)] * 4, [(20_000, 2), (2, 20_000)], [(2, 20_000), (20_000, 2)], [(9, 1)] * 2])
def test_of_the_smallest_and_longest_images_something_stays(sizes: list[tuple[int, int]]) -> None:
    for places in (layout(sizes), layout([*sizes, *sizes][:4])):
        assert all(x2 > x1 and y2 > y1 for x1, y1, x2, y2 in places)
        assert places[-1][2] * places[-1][3] <= 80_000


def config(folder: Path, *overrides: str) -> CfgNode:
    data = write_rectangles(folder, 8, size=64)
    fixed = ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.CROP.ENABLED", "False", "INPUT.RANDOM_FLIP", "none"]
    cfg = load_config(RECIPE, [*config_values(data, Path("unused"), f"mosaic_{folder}"), *fixed, *overrides])
    register_datasets(cfg)
    return cfg


def make_loader(cfg: CfgNode) -> TrainingLoader:
    return build_train_loader(cfg, ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)]))


def test_a_fraction_of_the_images_is_joined_and_a_batch_comes_again(tmp_path: Path) -> None:
    cfg = config(tmp_path, "INPUT.MOSAIC", "0.5")
    loader = make_loader(cfg)
    objects = {record["image_id"]: len(record["annotations"]) for record in loader.records}
    batches = list(itertools.islice(loader, 40))
    samples = list(itertools.chain(*batches))
    joined = [len(sample["instances"]) > objects[sample["image_id"]] for sample in samples]
    assert 0.3 < np.mean(joined) < 0.7
    assert {tuple(sample["image"].shape) for sample in samples} == {(3, 64, 64), (3, 64, 127)}  # 45 x 91 before
    cfg.DATALOADER.NUM_WORKERS = 2
    later = make_loader(cfg)
    later.first_batch = 33
    for expected, found in zip(batches[33:], later, strict=False):
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(expected, found, strict=True))
        assert all(len(x["instances"]) == len(y["instances"]) for x, y in zip(expected, found, strict=True))


def test_without_mosaics_a_mapper_gets_one_record(tmp_path: Path) -> None:
    assert load_config(RECIPE).INPUT.MOSAIC == 0
    loader = build_train_loader(config(tmp_path), lambda record: record)
    assert len(next(iter(loader))[0]["annotations"]) > 0


def test_grey_images_are_joined(tmp_path: Path) -> None:
    cfg = config(tmp_path, "INPUT.MOSAIC", "1.0", "INPUT.FORMAT", "L")
    assert {tuple(sample["image"].shape) for sample in next(iter(make_loader(cfg)))} <= {(1, 64, 64), (1, 64, 127)}


def test_a_mapper_that_takes_one_record_is_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, "INPUT.MOSAIC", "0.5")
    with pytest.raises(ValueError, match=r"INPUT\.MOSAIC is 0\.5, but <.* takes one record only"):
        build_train_loader(cfg, lambda record: record)


def test_the_contact_sheet_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = []
    monkeypatch.setattr(contact_sheet, "_draw_sample", lambda sample, *_: objects.append(len(sample["instances"])))
    monkeypatch.setattr(contact_sheet, "_arrange", lambda panels: panels)
    for fraction in (0.0, 1.0):
        cfg = config(tmp_path / str(fraction), "INPUT.MOSAIC", str(fraction))
        contact_sheet.draw_contact_sheet(cfg, nn.Identity(), 8)
    assert sum(objects[8:]) > 1.5 * sum(objects[:8])


def test_damaged_parts_are_replaced_or_named(tmp_path: Path) -> None:
    cfg = config(tmp_path, "INPUT.MOSAIC", "1.0")
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        list(itertools.islice(make_loader(cfg), 20))
    cfg.INPUT.ON_UNREADABLE = "skip"
    loader = make_loader(cfg)
    assert len(list(itertools.islice(loader, 20))) == 20
    assert loader.unreadable > 0


def test_an_object_that_is_wrong_in_a_part_is_named(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    records = []
    for number in range(2):
        image, annotation = image_with_object(number, SIZES[number])
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        records.append({"file_name": str(tmp_path / f"{number}.png"), "annotations": [annotation]})
    records[1]["annotations"][0]["bbox"] = [1, 2, "x", 4]
    mapper = ImageMapper(tiny_cfg, is_train=True, augmentations=[build_train_augmentation(tiny_cfg)])
    with pytest.raises(ValueError, match=r'1\.png, annotation 1: "bbox" is'):
        mapper(records[0], [records[1]])


@pytest.mark.parametrize("fraction", ["-0.1", "1.5"])
def test_what_is_no_fraction_is_refused(fraction: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"INPUT\.MOSAIC is .*; it must be a fraction"):
        make_loader(config(tmp_path, "INPUT.MOSAIC", fraction))


def test_memory_is_tried_with_the_objects_of_a_mosaic(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    most = _most_objects(cfg)
    cfg.INPUT.MOSAIC = 0.5
    assert _most_objects(cfg) == 4 * most
