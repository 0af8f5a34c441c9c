"""The augmentation of DETR and its descendants, made of detectron2's parts."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import transforms as T


def build_train_augmentation(cfg: CfgNode) -> T.Augmentation:
    """Flip; with `INPUT.CROP.PROBABILITY` resize and crop; resize to one of `INPUT.MIN_SIZE_TRAIN`.

    Three more are off by default: vertical flips and quarter turns, for pictures without an up, and colour jitter.
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
            crop.insert(0, T.ResizeShortestEdge(i.CROP.RESIZE_FIRST, sample_style="choice"))
        steps.append(T.RandomApply(T.AugmentationList(crop), prob=i.CROP.PROBABILITY))
    steps.append(T.ResizeShortestEdge(i.MIN_SIZE_TRAIN, i.MAX_SIZE_TRAIN, i.MIN_SIZE_TRAIN_SAMPLING))
    if i.COLOR_JITTER > 0:  # last: on no more pixels than are left
        low, high = 1 - i.COLOR_JITTER, 1 + i.COLOR_JITTER
        steps += [T.RandomBrightness(low, high), T.RandomContrast(low, high), T.RandomSaturation(low, high)]
    return T.AugmentationList(steps)
