"""Find the largest batch that fits a device."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from dino_d2.autocast import autocast, autocast_of_config
from dino_d2.modeling.criterion import boxes_of_this_process

from .optimizer import build_optimizer

ON_CPU = 2  # running out of memory there means swapping, not an error
HEADROOM = 1.1  # factor for the longer side: memory fragments over time, and distributed training copies gradients


def largest_divisor(share: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `share` that fits, found by doubling; 0 if not even one image fits."""
    fitting, tried = 0, 1
    while fits(tried):
        fitting = tried
        if tried == share:
            break
        tried = min(2 * tried, share)
    return next((size for size in range(fitting, 0, -1) if share % size == 0), 0)


def largest_batch(cfg: CfgNode, share: int, most_objects: int) -> int:
    """The largest batch, a divisor of a process's `share`, that fits into device memory; at most `ON_CPU` on a CPU.

    Tries training steps on random images of the largest training size with the most objects.

    Raises:
        ValueError: not even one image fits.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cpu":
        return math.gcd(share, ON_CPU)
    height, width = largest_size(cfg)

    def fits(size: int) -> bool:
        try:
            batch = [example(height, width, most_objects) for _ in range(size)]
            make_steps(cfg, [batch] * 2)  # in the second the optimizer's state is in memory
            fitted = True
        except torch.OutOfMemoryError:
            fitted = False
        release(device)  # not before the exception is gone, which holds the model
        return fitted

    size = largest_divisor(share, fits)
    if size == 0:
        raise ValueError(
            f"one image of {height} x {width} pixels with {most_objects} objects does not fit into device memory: "
            "reduce INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, or set MODEL.DINO.CHECKPOINT.ENCODER True"
        )
    return size


def largest_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of the largest padded image; without grouping, wide and tall images share a batch."""
    longest = cfg.INPUT.MAX_SIZE_TRAIN
    shortest = min(max(cfg.INPUT.MIN_SIZE_TRAIN), longest) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else longest
    return shortest, math.ceil(longest * HEADROOM)


def example(height: int, width: int, objects: int) -> dict:
    """A model input: a noise image with the given number of objects."""
    corners = torch.rand(objects, 2) * torch.tensor([width / 2, height / 2])
    boxes = Boxes(torch.cat([corners, corners + torch.tensor([width / 4, height / 4])], dim=1))
    instances = Instances((height, width), gt_boxes=boxes, gt_classes=torch.zeros(objects, dtype=torch.int64))
    return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8), "instances": instances}


def make_steps(cfg: CfgNode, batches: Iterable[list[dict]], parts: int = 1) -> list[float]:
    """Train a new model for a step on each batch, of which nothing is kept.

    Args:
        parts: forward and backward passes per batch (gradient accumulation).

    Returns:
        when each step ended, in seconds of `time.perf_counter`.
    """
    model: nn.Module = build_model(cfg).train()
    model.criterion.count_boxes = boxes_of_this_process  # the others do not take part
    optimizer = build_optimizer(cfg, model)
    device = torch.device(cfg.MODEL.DEVICE)
    ends = []
    for batch in batches:
        size = len(batch) // parts
        for first in range(0, len(batch), size):
            with autocast(device.type, autocast_of_config("SOLVER.AMP", cfg.SOLVER.AMP)):
                losses = model(batch[first : first + size])
            sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        ends.append(time.perf_counter())
    return ends


def release(device: torch.device) -> None:
    """Free the memory of a trial."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
