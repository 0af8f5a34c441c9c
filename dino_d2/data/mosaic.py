"""Mosaic: four samples in one image, for more objects per step (YOLOv4, arXiv 2004.10934; "dense one-to-one" of DEIM,
arXiv 2412.04234, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torchvision.transforms.v2.functional import resize

PARTS = 4
CENTRE = (0.35, 0.65)  # of the image's sides: where the four parts meet
SMALLEST = 4  # pixels: objects with a shorter side after scaling are left out


def mosaic(samples: Sequence[dict[str, Any]], fill: Sequence[float]) -> dict[str, Any]:
    """Put four training samples together, as an image of the first one's size.

    They meet in a random point near the middle, and each is scaled down to fit into its quarter, as a whole.

    Args:
        samples: four, as `ImageMapper` returns them; not modified.
        fill: value of each channel where there is no image.

    Returns:
        the first sample with another "image" and other "instances".
    """
    height, width = samples[0]["image"].shape[-2:]
    x, y = (round(side * np.random.uniform(*CENTRE)) for side in (width, height))
    canvas = samples[0]["image"].new_tensor([round(value) for value in fill]).view(-1, 1, 1)
    canvas = canvas.repeat(1, height, width)
    boxes, classes = [], []
    for number, sample in enumerate(samples):
        right, below = number % 2, number // 2
        quarter_width, quarter_height = (width - x if right else x), (height - y if below else y)
        own_height, own_width = sample["image"].shape[-2:]
        scale = min(quarter_height / own_height, quarter_width / own_width)
        size = max(int(own_height * scale), 1), max(int(own_width * scale), 1)
        left, top = (x if right else x - size[1]), (y if below else y - size[0])
        canvas[:, top : top + size[0], left : left + size[1]] = resize(sample["image"], list(size), antialias=True)
        objects = sample["instances"]
        factor = torch.tensor([size[1] / own_width, size[0] / own_height] * 2)
        moved = objects.gt_boxes.tensor * factor + torch.tensor([left, top] * 2)
        large = (moved[:, 2:] - moved[:, :2]).min(1).values >= SMALLEST
        boxes.append(moved[large])
        classes.append(objects.gt_classes[large])
    together = Instances((height, width), gt_boxes=Boxes(torch.cat(boxes)), gt_classes=torch.cat(classes))
    return samples[0] | {"image": canvas, "instances": together}
