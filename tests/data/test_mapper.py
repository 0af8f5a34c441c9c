"""From a record to an input of the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
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


def test_test_inputs_have_the_picture_and_no_annotations(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    tiny_cfg.INPUT.MIN_SIZE_TEST = 40
    original = record(tmp_path / "a.png", (30, 20))
    result = ImageMapper(tiny_cfg, is_train=False, augmentations=[build_test_augmentation(tiny_cfg)])(original)
    assert result["image"].shape == (3, 40, 60)
    assert result["image"].dtype == torch.uint8
    assert (result["height"], result["width"]) == (20, 30)
    assert "annotations" not in result
    assert "annotations" in original


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
