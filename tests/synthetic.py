"""A dataset that is made in a moment: coloured rectangles on noise, in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


def write_rectangles(folder: Path, count: int, size: int, empty: int = 0) -> tuple[Path, Path]:
    """Write `count` images of `size` pixels, the last `empty` of them without objects.

    Returns:
        the annotation file and the image folder.
    """
    rng = np.random.default_rng(0)
    images_folder = folder / "images"
    images_folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture = 120 + rng.normal(0, 8, (size, size, 3))
        for _ in range(rng.integers(1, 4) if number <= count - empty else 0):
            width, height = rng.integers(size // 5, size // 2, 2)
            x, y = rng.integers(0, size - width), rng.integers(0, size - height)
            category = int(rng.integers(1, 3))
            picture[y : y + height, x : x + width] = list(COLOURS.values())[category - 1]
            box = [int(x), int(y), int(width), int(height)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        name = f"{number}.png"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(images_folder / name)
        images.append({"id": number, "file_name": name, "height": size, "width": size})
    categories = [{"id": i, "name": name} for i, name in enumerate(COLOURS, start=1)]
    json_file = folder / "annotations.json"
    json_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return json_file, images_folder


def config_values(data: tuple[Path, Path], output: Path, name: str) -> list[str]:
    """KEY VALUE …: a tiny DINO trained and evaluated on that dataset."""
    values = {
        "MODEL.WEIGHTS": "''",
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.TIMM.NAME": "mobilenetv2_050",
        "MODEL.DINO.IN_FEATURES": ["stage2", "stage3", "stage4"],
        "MODEL.DINO.HIDDEN_DIM": 64,
        "MODEL.DINO.NHEADS": 4,
        "MODEL.DINO.DIM_FEEDFORWARD": 64,
        "MODEL.DINO.ENC_LAYERS": 1,
        "MODEL.DINO.DEC_LAYERS": 2,
        "MODEL.DINO.NUM_QUERIES": 20,
        "MODEL.DINO.NUM_CLASSES": len(COLOURS),
        "DATASETS.COCO_FORMAT": [[name, str(data[0]), str(data[1])]],
        "DATASETS.TRAIN": [name],
        "DATASETS.TEST": [name],
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": [128],
        "INPUT.MIN_SIZE_TEST": 128,
        "INPUT.CROP.ENABLED": False,
        "INPUT.RANDOM_FLIP": "none",
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 5e-4,
        "SOLVER.BACKBONE_MULTIPLIER": 1.0,
        "SOLVER.CHECKPOINT_PERIOD": 1000,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": str(output),
        "SEED": 1,
    }
    return [str(part) for item in values.items() for part in item]


def make_batch(counts: list[int], height: int = 64, width: int = 64) -> list[dict]:
    """Inputs for training: random images with so many small objects of two classes."""
    batch = []
    for count in counts:
        instances = Instances((height, width))
        corner = torch.rand(count, 2) * 30
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 5 + torch.rand(count, 2) * 25], dim=1))
        instances.gt_classes = torch.randint(2, (count,))
        batch.append({"image": torch.rand(3, height, width) * 255, "instances": instances})
    return batch


class SameBatch:
    """A loader that gives one batch again and again."""

    def __init__(self, batch: list[dict]):
        self.batch = batch

    def __iter__(self) -> Iterator[list[dict]]:
        while True:
            yield self.batch
