"""DETR's augmentation, built from detectron2's transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

LONGEST_BEFORE_CROP = 10_000  # pixels; never reached by COCO images, saves gigabytes for extremely long ones
SPARE = 1.5  # times the shorter side that is needed: that of a mosaic of two square images is 0.71 times theirs


class ResizeShortestEdge(T.ResizeShortestEdge):
    """detectron2's, but keeps at least one pixel of images thousands of times as long as wide."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


class RandomRotation(T.RandomRotation):
    """detectron2's, but images of one channel keep its axis."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.RotationTransform):
            return Rotation(transform.h, transform.w, transform.angle, transform.expand, interp=transform.interp)
        return transform


class Rotation(T.RotationTransform):
    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        rotated = super().apply_image(img, interp)
        return rotated.reshape(*rotated.shape[:2], *img.shape[2:])


class RandomSaturationOfBGR(T.RandomSaturation):
    """detectron2's, which takes all images for RGB."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return super().get_transform(image[..., ::-1])


SATURATION = {"RGB": [T.RandomSaturation], "BGR": [RandomSaturationOfBGR]}  # by INPUT.FORMAT; grey has none


class ResizingAugmentation(T.AugmentationList):
    """Augmentations that resize every image; `ImageMapper` reads large ones smaller.

    Args:
        shorter_side: of an image, in pixels, that is enough; None: all pixels are needed.
    """

    def __init__(self, steps: Sequence[T.Augmentation], shorter_side: int | None):
        super().__init__(steps)
        self.shorter_side = shorter_side


def build_train_augmentation(cfg: CfgNode) -> ResizingAugmentation:
    """Flip; with `INPUT.CROP.PROBABILITY` resize and crop; resize to one of `INPUT.MIN_SIZE_TRAIN`.

    Off by default: vertical flips and quarter turns, for images without an up, and colour jitter.
    """
    i = cfg.INPUT
    steps: list[T.Augmentation] = []
    if i.RANDOM_FLIP != "none":
        vertical = i.RANDOM_FLIP == "vertical"
        steps.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    if i.VERTICAL_FLIP:
        steps.append(T.RandomFlip(horizontal=False, vertical=True))
    if i.QUARTER_TURN:
        steps.append(RandomRotation([0, 90], sample_style="choice"))
    if i.CROP.ENABLED:
        crop: list[T.Augmentation] = [T.RandomCrop(i.CROP.TYPE, i.CROP.SIZE)]
        if i.CROP.RESIZE_FIRST:
            crop.insert(0, ResizeShortestEdge(i.CROP.RESIZE_FIRST, LONGEST_BEFORE_CROP, "choice"))
        steps.append(T.RandomApply(T.AugmentationList(crop), prob=i.CROP.PROBABILITY))
    steps.append(ResizeShortestEdge(i.MIN_SIZE_TRAIN, i.MAX_SIZE_TRAIN, i.MIN_SIZE_TRAIN_SAMPLING))
    if i.COLOR_JITTER > 0:  # last, when images are smallest
        low, high = 1 - i.COLOR_JITTER, 1 + i.COLOR_JITTER
        steps += [jitter(low, high) for jitter in (T.RandomBrightness, T.RandomContrast, *SATURATION.get(i.FORMAT, []))]
    return ResizingAugmentation(steps, _shorter_side(cfg))


def _shorter_side(cfg: CfgNode) -> int | None:
    """Shorter side of a training image that is enough; None: crops are taken from images as they are."""
    crop = cfg.INPUT.CROP
    if crop.ENABLED and not crop.RESIZE_FIRST:
        return None
    sizes = [*cfg.INPUT.MIN_SIZE_TRAIN, *(crop.RESIZE_FIRST if crop.ENABLED else [])]
    return None if 0 in sizes else math.ceil(max(sizes) * SPARE)  # 0: the image keeps its size


def build_test_augmentation(cfg: CfgNode) -> T.Augmentation:
    """Resize to `INPUT.MIN_SIZE_TEST`; 0: keep the size."""
    return ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
