"""Draw what the model is trained on: augmented samples with their objects and denoising queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw
from torch import Tensor, nn

from dino_d2.fonts import load_font, plain_text
from dino_d2.geometry import cxcywh_to_xyxy, xyxy_to_cxcywh
from dino_d2.structures import Targets

from .augmentation import build_train_augmentation
from .datasets import class_names
from .mapper import ImageMapper
from .mosaic import draw_others
from .records import load_records

PANEL, GAP, COLUMNS = 400, 16, 2  # pixels; longest side of an image, space around it, samples side by side
TITLE, CAPTION, LABEL = 64, 24, 12  # height in pixels
OBJECT, POSITIVE, NEGATIVE = (1.0, 0.85, 0.0), (0.0, 0.85, 1.0), (1.0, 0.3, 0.6)
PAPER, INK = (24, 26, 30), (235, 235, 235)
EXPLANATION = (
    ("objects", OBJECT),
    ("positive queries, to be denoised", POSITIVE),
    ("negative queries, to be classified as background", NEGATIVE),
)


@plain_text()
def draw_contact_sheet(cfg: CfgNode, denoising: nn.Module, count: int) -> Image.Image:
    """Draw up to `count` samples of `DATASETS.TRAIN` as training sees them, of images with objects.

    Each sample is drawn twice: with its objects, and with one group of denoising queries. Random numbers come from
    NumPy, as in detectron2, and torch.

    Args:
        cfg: its datasets must be registered (`register_datasets`).
        denoising: the model's, from `dino_d2.modeling.build.build_denoising`.
    """
    records = load_records(cfg.DATASETS.TRAIN, filter_empty=True, needs_annotations=True)
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)]
    mapper = ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])
    names = class_names(cfg)
    samples = [mapper(record, draw_others(records, cfg.INPUT.MOSAIC)) for record in chosen]
    return _arrange([_draw_sample(sample, cfg.INPUT.FORMAT, denoising, names) for sample in samples])


def _draw_sample(
    sample: dict[str, Any], image_format: str, denoising: nn.Module, names: Sequence[str]
) -> tuple[str, Image.Image, Image.Image]:
    """Caption, the image with objects, the image with denoising queries."""
    instances = sample["instances"]
    height, width = instances.image_size
    boxes = instances.gt_boxes.tensor / torch.tensor([width, height, width, height])
    targets = Targets(instances.gt_classes, xyxy_to_cxcywh(boxes))

    pixels = convert_image_to_rgb(sample["image"].permute(1, 2, 0), image_format)
    picture = Image.fromarray(pixels)
    scale = PANEL / max(width, height)
    size = [max(round(side * scale), 1) for side in picture.size]
    picture = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))

    with_objects = _Panel(picture)
    with_objects.add(targets.boxes, OBJECT, labels=[names[label] for label in targets.labels.tolist()])

    with torch.no_grad():
        queries = denoising([targets])
    is_positive = torch.zeros(len(queries), dtype=torch.bool)
    is_positive[queries.pairs.query] = True
    anchors, is_positive = queries.anchors[0, : queries.group_size], is_positive[: queries.group_size]
    with_queries = _Panel(picture)
    with_queries.add(anchors[~is_positive], NEGATIVE, line_style="--")
    with_queries.add(targets.boxes, OBJECT)
    with_queries.add(anchors[is_positive], POSITIVE)

    caption = f"{Path(sample['file_name']).name}, {width} x {height}: {len(targets)} objects, "
    caption += f"{queries.groups} groups of {queries.group_size} queries" if queries.groups else "denoising is off"
    return caption, with_objects.image(), with_queries.image()


class _Panel:
    """detectron2's Visualizer for boxes relative to an image (height, width, 3), RGB."""

    def __init__(self, picture: np.ndarray):
        self.visualizer = Visualizer(picture, font_size_scale=0.6)  # also makes lines thin
        self.size = torch.tensor([picture.shape[1], picture.shape[0]]).repeat(2)

    def add(self, boxes: Tensor, colour: tuple[float, ...], labels: Sequence[str] = (), line_style: str = "-") -> None:
        corners = (cxcywh_to_xyxy(boxes) * self.size).numpy()
        for box in corners:
            self.visualizer.draw_box(box, alpha=1.0, edge_color=colour, line_style=line_style)
        for box, label in zip(corners, labels, strict=False):
            above = (box[0], max(box[1] - LABEL, 0))  # a label must not cover a small object
            self.visualizer.draw_text(label, above, color=colour, horizontal_alignment="left")

    def image(self) -> Image.Image:
        return Image.fromarray(self.visualizer.get_output().get_image())


def _arrange(samples: Sequence[tuple[str, Image.Image, Image.Image]]) -> Image.Image:
    """Arrange the samples in rows, each as tall as its tallest image, below a legend of the colours."""
    rows = [samples[i : i + COLUMNS] for i in range(0, len(samples), COLUMNS)]
    heights = [max(picture.height for _, picture, _ in row) + CAPTION + GAP for row in rows]
    cell = 2 * (PANEL + GAP)
    sheet = Image.new("RGB", (COLUMNS * cell + GAP, TITLE + sum(heights)), PAPER)
    draw, font = ImageDraw.Draw(sheet), load_font(15, [caption for caption, _, _ in samples])

    x = GAP
    for text, colour in EXPLANATION:
        rgb = tuple(round(255 * c) for c in colour)
        draw.rectangle([x, TITLE // 2 - 8, x + 22, TITLE // 2 + 8], outline=rgb, width=3)
        draw.text((x + 32, TITLE // 2), text, fill=INK, font=font, anchor="lm")
        x += 32 + round(draw.textlength(text, font)) + 3 * GAP

    y = TITLE
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, *pictures) in enumerate(row):
            x = GAP + column * cell
            draw.text((x, y + CAPTION // 2 - 2), caption, fill=INK, font=font, anchor="lm")
            for picture in pictures:
                sheet.paste(picture, (x, y + CAPTION))
                x += PANEL + GAP // 2
        y += height
    return sheet
