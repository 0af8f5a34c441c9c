"""A COCO annotation file and a folder of images: batches for training, AP."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.transforms.v2 import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Sample = tuple[Tensor, dict[str, Tensor]]


class CocoImages:
    """Images, resized so that the longer side has `size` pixels, and their objects."""

    def __init__(self, json_file: Path, folder: Path, size: int):
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(json_file))
        self.folder, self.size = folder, size
        self.image_ids, self.categories = sorted(self.coco.imgs), sorted(self.coco.cats)

    def load(self, image_id: int, flip: bool = False) -> Sample:
        """The normalised image (3, H, W), and its `class_labels` (n,) and `boxes` (n, 4) as `model.Labels` has them."""
        with Image.open(self.folder / self.coco.imgs[image_id]["file_name"]) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        width, height = image.size
        objects = [each for each in self.coco.imgToAnns[image_id] if not each.get("iscrowd")]
        corner, size = torch.tensor([each["bbox"] for each in objects]).float().reshape(-1, 4).split(2, dim=1)
        boxes = torch.cat([corner + size / 2, size], dim=1) / torch.tensor([width, height] * 2)
        labels = torch.tensor([self.categories.index(each["category_id"]) for each in objects], dtype=torch.int64)
        scale = self.size / max(width, height)
        pixels = functional.pil_to_tensor(image.resize((round(width * scale), round(height * scale)))) / 255
        if flip:
            pixels, boxes[:, 0] = pixels.flip(-1), 1 - boxes[:, 0]
        return functional.normalize(pixels, MEAN, STD), {"class_labels": labels, "boxes": boxes}

    def evaluate(self, found: list[dict]) -> tuple[float, float]:
        """AP and AP50, in percent, of detections in COCO's format, whose `category_id` is the index of the class."""
        results = [each | {"category_id": self.categories[each["category_id"]]} for each in found]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.coco, self.coco.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(100 * evaluation.stats[0]), float(100 * evaluation.stats[1])


def collate(samples: Sequence[Sample]) -> dict:
    """Pad images at the right and at the bottom, to the size of the largest: arguments of the model."""
    height, width = (max(image.shape[side] for image, _ in samples) for side in (1, 2))
    pixels = torch.zeros(len(samples), 3, height, width)
    mask = torch.zeros(len(samples), height, width, dtype=torch.int64)
    for number, (image, _) in enumerate(samples):
        pixels[number, :, : image.shape[1], : image.shape[2]] = image
        mask[number, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": [labels for _, labels in samples]}


def training_batches(images: CocoImages, count: int, batch_size: int, seed: int) -> Iterator[dict]:
    """`count` batches, in an order and with flips that depend on the seed alone."""
    random = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(count):
        while len(waiting) < batch_size:
            waiting += torch.randperm(len(images.image_ids), generator=random).tolist()
        flips = torch.rand(batch_size, generator=random) < 0.5
        chosen, waiting = waiting[:batch_size], waiting[batch_size:]
        yield collate([images.load(images.image_ids[i], bool(flip)) for i, flip in zip(chosen, flips, strict=True)])
