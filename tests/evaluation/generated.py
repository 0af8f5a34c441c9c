"""Annotations and detections that are hard on an evaluation: crowds, ties, exact IoUs, images without either.

The numbers come from `RandomState`, whose stream NumPy keeps for ever, and are rounded: they are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances

WIDTH, HEIGHT = 640, 480
EMPTY = 0.1  # share of images without objects, and of images without detections


@dataclass
class Generated:
    """dataset: in COCO's format. detections: in COCO's result format, with the ids of the dataset's categories."""

    dataset: dict[str, Any]
    detections: list[dict[str, Any]]


def generate(images: int, classes: int, objects: int, detections: int, seed: int = 0) -> Generated:
    """`objects` an image on average, `detections` of each image, half of them near an object."""
    rng = np.random.RandomState(seed)
    # Ids as in COCO: with gaps, and in no order.
    category_ids = [int(x) for x in 3 * rng.permutation(classes) + 2]
    image_ids = [int(x) for x in rng.permutation(images) + 1]
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image_id in image_ids:
        here = []
        for _ in range(rng.poisson(objects) if rng.rand() > EMPTY else 0):
            box = _box(rng)
            here.append((box, category_ids[rng.randint(classes)]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": here[-1][1],
                    "bbox": box,
                    "area": round(box[2] * box[3] * rng.uniform(0.4, 1), 2),  # of a mask in the box
                    "iscrowd": int(rng.rand() < 0.1),
                }
            )
        for _ in range(detections if rng.rand() > EMPTY else 0):
            found.append({"image_id": image_id, **_detection(rng, here, category_ids)})
    return Generated(
        {
            "images": [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in image_ids],
            "annotations": annotations,
            "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
        },
        found,
    )


def generate_lvis(images: int, classes: int, objects: int, detections: int, seed: int = 0) -> Generated:
    """In LVIS's format: some classes are known to be absent from an image, some are not annotated exhaustively."""
    made = generate(images, classes, objects, detections, seed)
    rng = np.random.RandomState(seed + 1)
    category_ids = [category["id"] for category in made.dataset["categories"]]
    present: dict[int, set[int]] = {image["id"]: set() for image in made.dataset["images"]}
    for annotation in made.dataset["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        del annotation["iscrowd"]
    for category in made.dataset["categories"]:
        category["frequency"] = "rcf"[rng.randint(3)]
    for image in made.dataset["images"]:
        here = sorted(present[image["id"]])
        image["neg_category_ids"] = [x for x in category_ids if x not in here and rng.rand() < 0.3]
        image["not_exhaustive_category_ids"] = [x for x in here if rng.rand() < 0.3]
        image["coco_url"] = f"http://localhost/images/{image['file_name']}"
    return made


def detect(evaluator: DatasetEvaluator, made: Generated) -> dict[str, dict[str, float]]:
    """What the evaluator says of the detections, given to it as a model does: classes in the order of their ids."""
    ids = sorted(category["id"] for category in made.dataset["categories"])
    evaluator.reset()
    for image in made.dataset["images"]:
        found = [x for x in made.detections if x["image_id"] == image["id"]]
        boxes = torch.tensor([x["bbox"] for x in found], dtype=torch.float64).reshape(-1, 4)
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        instances.scores = torch.tensor([x["score"] for x in found])
        instances.pred_classes = torch.tensor([ids.index(x["category_id"]) for x in found], dtype=torch.int64)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def _box(rng: np.random.RandomState) -> list[float]:
    """x, y, width, height, from 4 to 400 pixels wide, large ones as often as small ones."""
    width, height = 4 * 100 ** rng.rand(2)
    x, y = rng.rand(2) * [max(1, WIDTH - width), max(1, HEIGHT - height)]
    return [round(float(number), 2) for number in (x, y, width, height)]


def _detection(rng: np.random.RandomState, objects: list[tuple], category_ids: list[int]) -> dict[str, Any]:
    box, category = _box(rng), category_ids[rng.randint(len(category_ids))]
    score = rng.uniform(0, 0.6)
    if objects and rng.rand() < 0.5:
        (x, y, width, height), own = objects[rng.randint(len(objects))]
        category = own if rng.rand() < 0.8 else category
        score = rng.uniform(0.2, 1)
        if rng.rand() < 0.3:  # IoU on a threshold, or one rounding beside it
            box = [x, y, width * [0.5, 0.55, 0.75, 0.95, 1.0][rng.randint(5)], height]
        else:
            dx, dy, dw, dh = rng.normal(0, 0.1, 4)
            box = [x + dx * width, y + dy * height, width * abs(1 + dw), height * abs(1 + dh)]
            box = [round(float(number), 2) for number in box]
    return {"category_id": category, "bbox": box, "score": round(float(score), 2)}  # two digits: many ties
