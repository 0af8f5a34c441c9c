"""Detections that are all right, and errors to put into them or into the annotations."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_d2.data import CocoFiles

CAT, DOG, BIRD = 3, 7, 9  # category ids; classes 0, 1, 2
IMAGES = 8


@dataclass
class Known:
    """dataset: in COCO's format. detections: in COCO's results format."""

    dataset: dict[str, Any]
    detections: list[dict[str, Any]]

    def write(self, folder: Path) -> CocoFiles:
        file = folder / "val.json"
        file.write_text(json.dumps(self.dataset))
        return CocoFiles(file, folder)

    def changed(self, *changes: Callable[[Known], None]) -> Known:
        made = copy.deepcopy(self)
        for change in changes:
            change(made)
        return made

    def object_of(self, image: int, category: int) -> dict[str, Any]:
        """The only one in the annotations."""
        return _only(self.dataset["annotations"], image, category)

    def detection_of(self, image: int, category: int) -> dict[str, Any]:
        return _only(self.detections, image, category)


def perfect() -> Known:
    """A cat, a dog and a bird in each image, all found, with scores from 0.6 to 0.8."""
    annotations, detections = [], []
    for image in range(1, IMAGES + 1):
        for place, category in enumerate((CAT, DOG, BIRD)):
            box = [40.0 + 200 * place, 30.0 + 10 * image, 60.0, 50.0]
            ids = {"image_id": image, "category_id": category, "bbox": box}
            annotations.append(ids | {"id": len(annotations) + 1, "area": 3000.0, "iscrowd": 0})
            detections.append(copy.deepcopy(ids) | {"score": 0.6 + 0.2 * len(detections) / (3 * IMAGES)})
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, IMAGES + 1)]
    categories = [{"id": i, "name": name} for i, name in ((CAT, "cat"), (DOG, "dog"), (BIRD, "bird"))]
    return Known({"images": images, "annotations": annotations, "categories": categories}, detections)


# Errors of the detector, each in an image of its own, sure enough to cost AP.


def rename_detection(made: Known) -> None:
    made.detection_of(2, CAT).update(category_id=DOG, score=0.95)


def move_detection(made: Known) -> None:
    """IoU is 1 / 3."""
    found = made.detection_of(3, DOG)
    found["bbox"][0] += 30
    found["score"] = 0.9


def double_detection(made: Known) -> None:
    found = made.detection_of(4, BIRD)
    found["score"] = 0.98
    made.detections.append(found | {"score": 0.97})


def leave_out_detection(made: Known) -> None:
    made.detections.remove(made.detection_of(5, CAT))


def add_false_detection(made: Known) -> None:
    made.detections.append({"image_id": 6, "category_id": BIRD, "bbox": [300.0, 300.0, 50.0, 50.0], "score": 0.99})


# The same of the annotations.


def rename_annotation(made: Known) -> None:
    made.object_of(2, CAT)["category_id"] = DOG
    made.detection_of(2, CAT)["score"] = 0.95


def move_annotation(made: Known) -> None:
    made.object_of(3, DOG)["bbox"][0] += 30
    made.detection_of(3, DOG)["score"] = 0.95


def double_annotation(made: Known) -> None:
    entry = made.object_of(4, BIRD)
    x, y, width, height = entry["bbox"]
    made.dataset["annotations"].append(entry | {"id": 100, "bbox": [x + 1, y, width, height]})


def leave_out_annotation(made: Known) -> None:
    made.dataset["annotations"].remove(made.object_of(5, CAT))
    made.detection_of(5, CAT)["score"] = 0.95


def _only(entries: list[dict[str, Any]], image: int, category: int) -> dict[str, Any]:
    (entry,) = (x for x in entries if (x["image_id"], x["category_id"]) == (image, category))
    return entry
