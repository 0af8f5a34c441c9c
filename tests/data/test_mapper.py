"""From a record to an input of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image

from dino_d2.data import ImageMapper, build_test_augmentation, build_train_augmentation


def record(path: Path, size: tuple[int, int], box: Any = (1, 1, 5, 5), category: Any = 2) -> dict:
    """One image of (width, height), with one object."""
    Image.effect_noise(size, 50).convert("RGB").save(path)
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": category, "iscrowd": 0}
    return {"file_name": str(path), "width": size[0], "height": size[1], "image_id": 1, "annotations": [annotation]}


def train_mapper(cfg: CfgNode) -> ImageMapper:
    return ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])


def test_boxes_are_those_of_detectron2(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """To the bit, whatever their mode; crowds and what a crop leaves nothing of are dropped."""
    tiny_cfg.INPUT.QUARTER_TURN = tiny_cfg.INPUT.VERTICAL_FLIP = True
    original = record(tmp_path / "a.png", (61, 47), box=(1.0, 1.0, 5.0, 5.0))
    rng = np.random.default_rng(0)
    for _ in range(30):
        x, y, w, h = (rng.random(4) * [40, 30, 30, 25]).tolist()
        absolute = rng.random() < 0.3
        original["annotations"].append(
            {
                "bbox": [x, y, x + w, y + h] if absolute else [x, y, w, h],
                "bbox_mode": BoxMode.XYXY_ABS if absolute else BoxMode.XYWH_ABS,
                "category_id": int(rng.integers(80)),
                "iscrowd": int(rng.random() < 0.2),
            }
        )
    empty = original | {"annotations": []}
    theirs = DatasetMapper(tiny_cfg, is_train=True, augmentations=[build_train_augmentation(tiny_cfg)])
    counts = set()
    for seed in range(12):
        for one in (original, empty):
            pair = []
            for mapper in (train_mapper(tiny_cfg), theirs):
                np.random.seed(seed)
                pair.append(mapper(copy.deepcopy(one))["instances"])
            assert torch.equal(pair[0].gt_boxes.tensor, pair[1].gt_boxes.tensor)
            assert torch.equal(pair[0].gt_classes, pair[1].gt_classes)
            assert pair[0].image_size == pair[1].image_size
            counts.add(len(pair[0]))
    assert len(counts) > 3  # crops differ


def test_boxes_of_whole_numbers_are_not_cut(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """detectron2 resizes them as integers, so each resize moves them to the upper left by half a pixel on average."""
    tiny_cfg.INPUT.RANDOM_FLIP, tiny_cfg.INPUT.CROP.ENABLED = "none", False
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (33,)
    (box,) = train_mapper(tiny_cfg)(record(tmp_path / "a.png", (30, 20), box=(1, 1, 5, 5)))["instances"].gt_boxes
    torch.testing.assert_close(box, torch.tensor([1, 1, 6, 6]) * torch.tensor([50 / 30, 33 / 20] * 2))


def test_test_inputs_have_the_picture_and_no_annotations(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.MIN_SIZE_TEST = 40
    original = record(tmp_path / "a.png", (30, 20))
    result = ImageMapper(tiny_cfg, is_train=False, augmentations=[build_test_augmentation(tiny_cfg)])(original)
    assert result["image"].shape == (3, 40, 60)
    assert result["image"].dtype == torch.uint8
    assert (result["height"], result["width"]) == (20, 30)
    assert "annotations" not in result
    assert "annotations" in original


def test_large_photograph_is_read_smaller_and_trained_on_alike(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    """A photograph of a telephone has fifty times the pixels that a small model is trained with."""
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.CROP.RESIZE_FIRST = (48, 64), [50, 60]
    original = record(tmp_path / "a.png", (800, 600), box=(200.0, 150.0, 100.0, 300.0))
    picture = Image.linear_gradient("L").resize((800, 600)).convert("RGB")
    picture.paste((250, 0, 90), (200, 150, 300, 450))
    samples = {}
    for ending in ("png", "jpg"):
        picture.save(tmp_path / f"a.{ending}", quality=95)
        one = original | {"file_name": str(tmp_path / f"a.{ending}")}
        mapper = train_mapper(tiny_cfg)
        assert mapper.read(one)[0].shape == {"png": (600, 800, 3), "jpg": (150, 200, 3)}[ending]
        samples[ending] = []
        for seed in range(8):  # with crop and without
            np.random.seed(seed)
            samples[ending].append(mapper(one))
    for large, small in zip(*samples.values(), strict=True):
        assert large["image"].shape == small["image"].shape
        assert (large["image"].float() - small["image"]).abs().mean() < 3
        boxes = [sample["instances"].gt_boxes.tensor for sample in (large, small)]
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-4)
    assert original["annotations"][0]["bbox"] == (200.0, 150.0, 100.0, 300.0)


def test_large_photograph_in_a_mosaic(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.CROP.ENABLED, tiny_cfg.INPUT.RANDOM_FLIP = (60,), False, "none"
    large, small = record(tmp_path / "a.jpg", (800, 800), box=(0, 0, 400, 800)), record(tmp_path / "b.jpg", (80, 80))
    sample = train_mapper(tiny_cfg)(large, [small])
    assert sample["image"].shape[1:] in [(60, 119), (60, 120), (60, 121)]
    torch.testing.assert_close(sample["instances"].gt_boxes.tensor[0], torch.tensor([0.0, 0, 30, 60]), rtol=0, atol=1)


@pytest.mark.parametrize(
    "why", ["crops of the whole image", "no resizing", "masks", "augmentations of one's own", "evaluation"]
)
def test_photograph_is_read_whole_if_its_pixels_are_needed(why: str, tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = tiny_cfg.INPUT.CROP.RESIZE_FIRST = (40,)
    tiny_cfg.MODEL.MASK_ON = why == "masks"
    if why == "crops of the whole image":
        tiny_cfg.INPUT.CROP.RESIZE_FIRST = []
    if why == "no resizing":
        tiny_cfg.INPUT.MIN_SIZE_TRAIN = (0, 40)
    augmentation = build_train_augmentation(tiny_cfg)
    if why == "augmentations of one's own":
        augmentation = T.RandomCrop("absolute", (40, 40))
    mapper = ImageMapper(tiny_cfg, is_train=why != "evaluation", augmentations=[augmentation])
    assert mapper.read(record(tmp_path / "a.jpg", (400, 300)))[0].shape == (300, 400, 3)


def test_large_photograph_of_another_size_than_its_record_is_refused(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    original = record(tmp_path / "a.jpg", (4000, 3000)) | {"width": 3999}
    with pytest.raises(SizeMismatchError, match=r"got \(4000, 3000\), expect \(3999, 3000\)"):
        train_mapper(tiny_cfg)(original)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20), (20, 20_000), (20_000, 2)])
def test_smallest_and_longest_pictures_are_trained_on(size: tuple[int, int], tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.MAX_SIZE_TRAIN = 300
    mapper, original = train_mapper(tiny_cfg), record(tmp_path / "a.png", size, box=(0, 0, *size))
    inputs = [mapper(original) for _ in range(8)]  # with crop and without
    assert all(min(x["image"].shape) >= 1 and max(x["image"].shape) <= 300 for x in inputs)
    losses = build_model(tiny_cfg).train()(inputs[:1])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("box", ["1,2,3,4", "1234", ["1", "2", "3", "4"], [1, 2, 3], [float("nan"), 1, 2, 3], 7, None])
def test_box_that_is_not_four_numbers_is_refused(box: Any, tiny_cfg: CfgNode, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'a\.png, annotation 1: "bbox" is .* four numbers'):
        train_mapper(tiny_cfg)(record(tmp_path / "a.png", (30, 20), box=box))


@pytest.mark.parametrize("mode", [None, BoxMode.XYWHA_ABS, BoxMode.XYXY_REL])
def test_box_in_other_units_is_refused(mode: Any, tiny_cfg: CfgNode, tmp_path: Path) -> None:
    original = record(tmp_path / "a.png", (30, 20))
    original["annotations"][0]["bbox_mode"] = mode
    with pytest.raises(ValueError, match=r'a\.png, annotation 1: "bbox_mode" is .* one of'):
        train_mapper(tiny_cfg)(original)


def test_masks_are_kept_for_who_asks_for_them(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.MODEL.MASK_ON, tiny_cfg.INPUT.CROP.ENABLED = True, False  # a crop may miss the object
    original = record(tmp_path / "a.png", (30, 20))
    original["annotations"][0]["segmentation"] = [[1, 1, 6, 1, 6, 6]]
    before = copy.deepcopy(original)
    assert len(train_mapper(tiny_cfg)(original)["instances"].gt_masks) == 1
    assert original == before


@pytest.mark.parametrize("category", ["cat", 1.5, None])
def test_category_that_is_no_number_is_refused(category: Any, tiny_cfg: CfgNode, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'a\.png, annotation 1: "category_id" is .* integer'):
        train_mapper(tiny_cfg)(record(tmp_path / "a.png", (30, 20), category=category))


def test_picture_of_another_size_than_annotated_is_named(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    turned = record(tmp_path / "upright.png", (30, 20)) | {"width": 20, "height": 30}  # annotated without its EXIF data
    with pytest.raises(SizeMismatchError, match=r"upright\.png"):
        train_mapper(tiny_cfg)(turned)


def test_damaged_picture_is_named(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    damaged = record(tmp_path / "damaged.png", (30, 20))
    (tmp_path / "damaged.png").write_bytes((tmp_path / "damaged.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"damaged\.png cannot be read"):
        train_mapper(tiny_cfg)(damaged)


def test_record_is_not_changed(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.CROP.ENABLED = False
    original = record(tmp_path / "a.png", (30, 20))
    original["annotations"].append(original["annotations"][0] | {"segmentation": [[1, 1, 5, 1, 5, 5]], "note": [1]})
    del original["width"], original["height"]  # the mapper adds them
    before = copy.deepcopy(original)
    mapped = train_mapper(tiny_cfg)(original)
    assert mapped["instances"].gt_classes.tolist() == [2, 2]
    assert str(original) == str(before)
