"""How many photographs a device can be trained on at once."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from dino_d2.autocast import autocast, autocast_of_config

from .optimizer import build_optimizer

ON_CPU = 2  # memory does not end there, it becomes slow
HEADROOM = 1.1  # of the longer side: memory is fragmented after hours, and several processes hold copies of gradients


def largest_part(share: int, fits: Callable[[int], bool]) -> int:
    """The most photographs at once, a divisor of `share`, by doubling until they do not fit; 0: not even one does."""
    fitting, tried = 0, 1
    while fits(tried):
        fitting = tried
        if tried == share:
            break
        tried = min(2 * tried, share)
    return next((size for size in range(fitting, 0, -1) if share % size == 0), 0)


def photographs_at_once(cfg: CfgNode, share: int, most_objects: int) -> int:
    """The largest part of the `share` of a process that its device has memory for; on a CPU at most `ON_CPU`.

    Steps are made with random photographs of the largest size that training has, with the most objects.

    Raises:
        ValueError: not even one photograph fits.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cpu":
        return math.gcd(share, ON_CPU)
    height, width = largest_size(cfg)

    def fits(size: int) -> bool:
        try:
            make_steps(cfg, [example(height, width, most_objects) for _ in range(size)])
            fitted = True
        except torch.OutOfMemoryError:
            fitted = False
        release(device)  # not before the exception is gone, which holds the model
        return fitted

    size = largest_part(share, fits)
    if size == 0:
        raise ValueError(
            f"one photograph of {height} x {width} pixels with {most_objects} objects needs more memory than the "
            "device has: smaller INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, or MODEL.DINO.CHECKPOINT.ENCODER True"
        )
    return size


def largest_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width; photographs are padded to the largest of their batch, which is wide or tall."""
    longest = cfg.INPUT.MAX_SIZE_TRAIN
    shortest = min(max(cfg.INPUT.MIN_SIZE_TRAIN), longest) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else longest
    return shortest, math.ceil(longest * HEADROOM)


def example(height: int, width: int, objects: int) -> dict:
    """A photograph of noise with so many objects, as an input of the model."""
    corners = torch.rand(objects, 2) * torch.tensor([width / 2, height / 2])
    boxes = Boxes(torch.cat([corners, corners + torch.tensor([width / 4, height / 4])], dim=1))
    instances = Instances((height, width), gt_boxes=boxes, gt_classes=torch.zeros(objects, dtype=torch.int64))
    return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8), "instances": instances}


def make_steps(cfg: CfgNode, batch: list[dict]) -> None:
    """Two training steps of a new model: the second has the state of the optimizer in memory."""
    model: nn.Module = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    for _ in range(2):
        with autocast(torch.device(cfg.MODEL.DEVICE).type, autocast_of_config("SOLVER.AMP", cfg.SOLVER.AMP)):
            losses = model(batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def release(device: torch.device) -> None:
    """What a step has left behind, for the next trial and for the training."""
    gc.collect()
    torch.get_device_module(device).empty_cache()
