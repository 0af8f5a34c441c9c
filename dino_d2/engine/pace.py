"""Measure how long a training step takes, and whether the processor is quicker in bfloat16."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

from dino_d2.data import ImageMapper, build_train_augmentation
from dino_d2.data.loader import SeededSamples
from dino_d2.randomness import own_random_numbers

from .batch_size import make_steps, release

WARM_UP, TIMED = 3, 12  # steps
ROWS, HIDDEN, WIDE = 512, 128, 1024  # of a product like those of a small model's feed-forward blocks
WORTH_BFLOAT16 = 0.5  # of float32's time: conversions and what stays float32 take their part of a step
REPEATS = 10  # the quickest counts, and the first of all does not
# Times per second of processor time that Linux takes a core from a thread: 18 on an idle machine of two cores, 145 with
# two threads beside another program, measured with predictions.
INTERRUPTED = 60

logger = logging.getLogger(__name__)


def seconds_per_step(cfg: CfgNode, share: int, parts: int) -> float:
    """Mean time of a training step on images of `DATASETS.TRAIN`, loading included, by this process alone.

    Warns if other programs use its cores.

    Args:
        share: images per step of a process.
        parts: in which they are processed (gradient accumulation).
    """
    with own_random_numbers(max(cfg.SEED, 0)), _warning_of_other_programs(cfg.MODEL.DEVICE):
        ends = make_steps(cfg, _batches(cfg, share, WARM_UP + TIMED), parts)
    release(torch.device(cfg.MODEL.DEVICE))
    return (ends[-1] - ends[WARM_UP - 1]) / TIMED


@contextmanager
def _warning_of_other_programs(device: str) -> Iterator[None]:
    """On a CPU PyTorch's threads spin while they wait for each other, so one that has no core of its own delays all."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    if sys.platform == "linux" and threads > 1 and after.ru_nivcsw - before.ru_nivcsw > INTERRUPTED * seconds:
        logger.warning(
            "Other programs use the processor. PyTorch's %d threads need a core each, or wait for each other most of "
            "the time: end the other programs, or set the environment variable OMP_NUM_THREADS to the number of free "
            "cores",
            threads,
        )


def bfloat16_share() -> float:
    """Time of a product of bfloat16 matrices on the CPU, as a share of that in float32.

    Far below 1 only where the processor has instructions for it: 0.2 to 0.3 on AMD's Zen 5, above 1 with AVX2 alone.
    """
    pairs = [
        [torch.randn(ROWS, HIDDEN).to(dtype), torch.randn(HIDDEN, WIDE).to(dtype)]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    times = [[_seconds_of_product(*pair) for pair in pairs] for _ in range(REPEATS + 1)]
    in_float32, in_bfloat16 = (min(column) for column in zip(*times[1:], strict=True))
    return in_bfloat16 / in_float32


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    begin = time.perf_counter()
    a @ b
    return time.perf_counter() - begin


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
