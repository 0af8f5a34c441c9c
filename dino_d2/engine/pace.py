"""Measure how long a training step takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from dino_d2.data import ImageMapper, build_train_augmentation
from dino_d2.data.loader import SeededSamples
from dino_d2.randomness import own_random_numbers

from .batch_size import make_steps, release

WARM_UP, TIMED = 3, 12  # steps


def seconds_per_step(cfg: CfgNode, share: int, parts: int) -> float:
    """Mean time of a training step on images of `DATASETS.TRAIN`, loading included, by this process alone.

    Args:
        share: images per step of a process.
        parts: in which they are processed (gradient accumulation).
    """
    with own_random_numbers(max(cfg.SEED, 0)):
        ends = make_steps(cfg, _batches(cfg, share, WARM_UP + TIMED), parts)
    release(torch.device(cfg.MODEL.DEVICE))
    return (ends[-1] - ends[WARM_UP - 1]) / TIMED


def _batches(cfg: CfgNode, size: int, count: int) -> Iterator[list[dict]]:
    """Batches of random images, wide ones with wide ones if the loader groups them."""
    mapper = ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])
    records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    wide = np.array([record["width"] > record["height"] for record in records])
    samples = SeededSamples(records, wide, mapper, (max(cfg.SEED, 0),), False, cfg.INPUT.MOSAIC)
    for place in range(0, count * size, size):
        first = np.random.randint(len(records))
        group = np.flatnonzero(wide == wide[first]) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else len(records)
        chosen = np.random.choice(group, size)
        yield [samples[place + number, index][0] for number, index in enumerate(chosen)]
