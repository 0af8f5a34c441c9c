"""DETR's augmentation, built from detectron2's transforms."""

from __future__ import annotations

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

LONGEST_BEFORE_CROP = 10_000  # pixels; never reached by COCO images, saves gigabytes for extremely long ones


class ResizeShortestEdge(T.ResizeShortestEdge):
    """detectron2's, but keeps at least one pixel of images thousands of times as long as wide."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


def build_train_augmentation(cfg: CfgNode) -> T.Augmentation:
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
        steps.append(T.RandomRotation([0, 90], sample_style="choice"))
    if i.CROP.ENABLED:
        crop: list[T.Augmentation] = [T.RandomCrop(i.CROP.TYPE, i.CROP.SIZE)]
        if i.CROP.RESIZE_FIRST:
            crop.insert(0, ResizeShortestEdge(i.CROP.RESIZE_FIRST, LONGEST_BEFORE_CROP, "choice"))
        steps.append(T.RandomApply(T.AugmentationList(crop), prob=i.CROP.PROBABILITY))
    steps.append(ResizeShortestEdge(i.MIN_SIZE_TRAIN, i.MAX_SIZE_TRAIN, i.MIN_SIZE_TRAIN_SAMPLING))
    if i.COLOR_JITTER > 0:  # last, when images are smallest
        low, high = 1 - i.COLOR_JITTER, 1 + i.COLOR_JITTER
        steps += [T.RandomBrightness(low, high), T.RandomContrast(low, high), T.RandomSaturation(low, high)]
    return T.AugmentationList(steps)


def build_test_augmentation(cfg: CfgNode) -> T.Augmentation:
    """Resize to `INPUT.MIN_SIZE_TEST`; 0: keep the size."""
    return ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
