"""Mosaics: several training images in one (YOLOv4, arXiv 2004.10934; DEIM, arXiv 2412.04234).

Where nearly every image has one object, DINO learns just that: its queries agree on one box, also for images with two.
In a mosaic the number of objects varies. Whole images are joined, without cropping or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from PIL import Image

Size = tuple[int, int]  # height, width
Place = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the mosaic

PARTS = (2, 4)  # images in a mosaic, equally often
LONGEST = 4  # times the width: height of a row


def mosaic(images: Sequence[np.ndarray], annotations: Sequence[Sequence[dict]]) -> tuple[np.ndarray, list[dict]]:
    """Join images and their objects.

    Args:
        images: two or four, each (H, W, 3) uint8.
        annotations: of each image, in detectron2's format; not modified.

    Returns:
        the mosaic, as wide as the first image, (H, W, 3) uint8; and its annotations with boxes as x1, y1, x2, y2.
    """
    places = layout([image.shape[:2] for image in images])
    joined = np.empty((places[-1][3], places[-1][2], 3), np.uint8)
    found: list[dict[str, Any]] = []
    for image, (x1, y1, x2, y2), of_image in zip(images, places, annotations, strict=True):
        joined[y1:y2, x1:x2] = np.asarray(Image.fromarray(image).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR))
        scale = np.array([x2 - x1, y2 - y1] * 2) / (image.shape[1::-1] * 2)
        for annotation in of_image:
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            box = (np.array(box) * scale + [x1, y1, x1, y1]).tolist()
            found.append(annotation | {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS})
    return joined, found


def layout(sizes: Sequence[Size]) -> list[Place]:
    """Where the images lie: two side by side, or one above the other if the first is wide; four in two rows.

    Images of a row have one height, and both rows the width of the first image. Each image keeps its aspect ratio, up
    to rounding, unless it is extremely tall.
    """
    height, width = sizes[0]
    columns = 1 if len(sizes) == 2 and width > height else 2
    width = max(width, columns)
    places, top = [], 0
    for start in range(0, len(sizes), columns):
        ratios = np.array([w / h for h, w in sizes[start : start + columns]])
        bottom = top + max(round(min(width / ratios.sum(), LONGEST * width)), 1)
        # Every image keeps a column of pixels.
        ends = np.arange(columns + 1) + np.concatenate([[0], ratios.cumsum() / ratios.sum()]) * (width - columns)
        edges = [round(end) for end in ends]
        places += [(left, top, right, bottom) for left, right in zip(edges[:-1], edges[1:], strict=True)]
        top = bottom
    return places
