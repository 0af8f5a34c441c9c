from __future__ import annotations

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from PIL import Image

from dino_d2.data import build_train_augmentation


def sizes(cfg: CfgNode, height: int, width: int, draws: int = 60) -> set[tuple[int, int]]:
    augmentation = build_train_augmentation(cfg)
    found = set()
    for _ in range(draws):
        picture = T.AugInput(np.zeros((height, width, 3), np.uint8))
        augmentation(picture)
        found.add(picture.image.shape[:2])
    return found


def test_published_recipe_resizes_the_short_side_to_480_to_800(tiny_cfg: CfgNode) -> None:
    found = sizes(tiny_cfg, 480, 640)
    short = {min(size) for size in found}
    assert short <= {480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800}
    assert len(short) > 5
    assert max(max(size) for size in found) <= 1333


def test_crops_change_the_shape_half_of_the_time(tiny_cfg: CfgNode) -> None:
    ratios = [width / height for height, width in sizes(tiny_cfg, 480, 640, draws=200)]
    assert any(abs(ratio - 4 / 3) > 0.05 for ratio in ratios)
    tiny_cfg.INPUT.CROP.PROBABILITY = 0.0
    assert all(abs(width / height - 4 / 3) < 0.02 for height, width in sizes(tiny_cfg, 480, 640))


def test_line_of_pixels_does_not_become_a_giant_before_it_is_cropped(
    tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_cfg.INPUT.CROP.PROBABILITY = 1.0
    seen, get_transform = [], T.RandomCrop.get_transform

    def watch(self: T.RandomCrop, image: np.ndarray) -> T.Transform:
        seen.append(image.shape)
        return get_transform(self, image)

    monkeypatch.setattr(T.RandomCrop, "get_transform", watch)
    sizes(tiny_cfg, 20, 20_000, draws=2)
    assert seen == [(10, 10_000, 3)] * 2


def test_grey_images_keep_their_axis(tiny_cfg: CfgNode) -> None:
    tiny_cfg.INPUT.FORMAT = "L"
    tiny_cfg.INPUT.VERTICAL_FLIP = tiny_cfg.INPUT.QUARTER_TURN = True
    tiny_cfg.INPUT.COLOR_JITTER = 0.4
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.CROP.ENABLED = [48], False
    augmentation = build_train_augmentation(tiny_cfg)
    found = set()
    for _ in range(10):
        picture = T.AugInput(np.full((48, 64, 1), 100, np.uint8))
        augmentation(picture)
        found.add(picture.image.shape)
    assert found == {(48, 64, 1), (64, 48, 1)}


def test_colour_jitter_is_the_same_in_both_channel_orders(tiny_cfg: CfgNode) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    tiny_cfg.INPUT.COLOR_JITTER, tiny_cfg.INPUT.RANDOM_FLIP = 0.4, "none"
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.CROP.ENABLED = [48], False
    found = {}
    for image_format, order in (("RGB", 1), ("BGR", -1)):
        tiny_cfg.INPUT.FORMAT = image_format
        picture = T.AugInput(pixels[..., ::order].copy())
        np.random.seed(0)
        build_train_augmentation(tiny_cfg)(picture)
        found[image_format] = picture.image[..., ::order]
    np.testing.assert_array_equal(found["BGR"], found["RGB"])
    assert not np.array_equal(found["RGB"], pixels)


def test_mapper_of_detectron2_uses_it_and_boxes_follow_the_picture(tiny_cfg: CfgNode, tmp_path) -> None:
    """A white square on black: wherever it ends up, its box is there."""
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[40:80, 100:160] = 255
    Image.fromarray(picture).save(tmp_path / "square.png")
    tiny_cfg.INPUT.VERTICAL_FLIP = tiny_cfg.INPUT.QUARTER_TURN = True
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = [200, 260]
    tiny_cfg.INPUT.CROP.RESIZE_FIRST, tiny_cfg.INPUT.CROP.SIZE = [], [150, 190]
    mapper = DatasetMapper(tiny_cfg, is_train=True, augmentations=[build_train_augmentation(tiny_cfg)])
    record = {
        "file_name": str(tmp_path / "square.png"),
        "height": 200,
        "width": 300,
        "annotations": [{"bbox": [100, 40, 160, 80], "bbox_mode": 0, "category_id": 0}],
    }
    seen = 0
    for _ in range(40):
        result = mapper(record)
        white = result["image"][0] > 127
        if not len(result["instances"]) or white.sum() < 100:
            continue
        seen += 1
        rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
        x1, y1, x2, y2 = result["instances"].gt_boxes.tensor[0].tolist()
        assert abs(x1 - int(columns[0])) < 3
        assert abs(y1 - int(rows[0])) < 3
        assert abs(x2 - int(columns[-1]) - 1) < 3
        assert abs(y2 - int(rows[-1]) - 1) < 3
    assert seen > 20


def test_color_jitter_changes_colours_and_nothing_else(tiny_cfg: CfgNode) -> None:
    tiny_cfg.INPUT.RANDOM_FLIP = "none"
    tiny_cfg.INPUT.CROP.ENABLED = False
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = [64]
    original = np.full((64, 64, 3), 100, np.uint8)
    tiny_cfg.INPUT.COLOR_JITTER = 0.4
    augmentation = build_train_augmentation(tiny_cfg)
    picture = T.AugInput(original.copy())
    augmentation(picture)
    assert picture.image.shape == original.shape
    assert (picture.image != original).any()
