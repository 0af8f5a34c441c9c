"""Mosaics: several training images in one (YOLOv4, arXiv 2004.10934; DEIM, arXiv 2412.04234).

Where nearly every image has one object, DINO learns just that: its queries agree on one box, also for images with two.
In a mosaic the number of objects varies. Whole images are joined, without cropping or padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

Size = tuple[int, int]  # height, width
Place = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the mosaic

PARTS = (2, 4)  # images in a mosaic, equally often


def draw_others(records: Sequence[dict[str, Any]], fraction: float) -> list[dict[str, Any]]:
    """Records that make a mosaic together with another one; none for an image that stays as it is.

    Args:
        fraction: of images that become mosaics; with 0 no random number is drawn.
    """
    if fraction == 0 or np.random.rand() >= fraction:
        return []
    return [records[index] for index in np.random.randint(len(records), size=np.random.choice(PARTS) - 1)]


def mosaic(images: Sequence[np.ndarray], annotations: Sequence[Sequence[dict]]) -> tuple[np.ndarray, list[dict]]:
    """Join images and their objects.

    Args:
        images: two or four, each (H, W, channels) uint8.
        annotations: of each image, in detectron2's format; not modified.

    Returns:
        the mosaic, (H, W, channels) uint8, with as many pixels as the largest image; and its annotations with boxes as
        x1, y1, x2, y2.
    """
    places = layout([image.shape[:2] for image in images])
    joined = np.empty((places[-1][3], places[-1][2], *images[0].shape[2:]), np.uint8)
    found: list[dict[str, Any]] = []
    for image, (x1, y1, x2, y2), of_image in zip(images, places, annotations, strict=True):
        resize = T.ResizeTransform(*image.shape[:2], y2 - y1, x2 - x1)
        joined[y1:y2, x1:x2] = resize.apply_image(image)
        scale = np.array([x2 - x1, y2 - y1] * 2) / (image.shape[1::-1] * 2)
        for annotation in of_image:
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            box = (np.array(box) * scale + [x1, y1, x1, y1]).tolist()
            found.append(annotation | {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS})
    return joined, found


def layout(sizes: Sequence[Size]) -> list[Place]:
    """Where the images lie: two side by side, or one above the other if the first is wide; four in two rows.

    Images of a row have one height, and rows one width. Each image keeps its aspect ratio, up to rounding, and at least
    one pixel. The mosaic has as many pixels as the largest image.
    """
    height, width = sizes[0]
    columns = 1 if len(sizes) == 2 and width > height else 2
    ratios = np.array([w / h for h, w in sizes]).reshape(-1, columns)
    heights = 1 / ratios.sum(1)  # of the rows, for a width of 1
    total = max(round(np.sqrt(max(h * w for h, w in sizes) / heights.sum())), columns)
    places, top = [], 0
    for of_row, share in zip(ratios, heights, strict=True):
        bottom = top + max(round(total * share), 1)
        widths = 1 + of_row * share * (total - columns)  # every image has its column of pixels
        edges = [0, *(round(edge) for edge in widths.cumsum())]
        places += [(left, top, right, bottom) for left, right in zip(edges[:-1], edges[1:], strict=True)]
        top = bottom
    return places
