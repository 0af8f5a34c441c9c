#!/usr/bin/env python3
"""Time COCO AP on a generated dataset of val2017's size with pycocotools and hotcoco, and compare the results.

    dev/benchmark_evaluation.py                  5,000 images, 300 detections each
    dev/benchmark_evaluation.py --images 50

Both run in dino_d2's evaluator, as in training. Prints a Markdown table. The exit code is 1 if a metric differs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from dino_d2.evaluation import APSettings, COCOEvaluator

CLASSES, OBJECTS, DETECTIONS = 80, 7, 300  # OBJECTS per image on average
WIDTH, HEIGHT = 640, 480
NAME = "generated_val"


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random boxes (count, 4) x1, y1, x2, y2 in the image, 8 to 400 pixels wide."""
    sides = 8 * 50 ** rng.random((count, 2))
    corner = rng.random((count, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1)
    return np.hstack([corner, np.minimum(corner + sides, [WIDTH, HEIGHT])])


def generate(images: int, json_file: Path) -> list[tuple[dict, dict]]:
    """Write annotations, and return input and output of a model for each image.

    A third of the detections are near an object, most of these with its class; the rest are anywhere.
    """
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        truth, labels = boxes(rng, rng.poisson(OBJECTS)), rng.integers(CLASSES, size=DETECTIONS)
        for box, label in zip(truth, labels, strict=False):
            x1, y1, x2, y2 = box.tolist()
            annotation = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label) + 1}
            annotations.append(ids | annotation)
        found, classes, scores = boxes(rng, DETECTIONS), rng.integers(CLASSES, size=DETECTIONS), rng.random(DETECTIONS)
        if len(truth):
            near = np.arange(DETECTIONS // 3) % len(truth)
            found[: len(near)] = truth[near] + rng.normal(0, 4, (len(near), 4))
            found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
            classes[: len(near)] = np.where(rng.random(len(near)) < 0.8, labels[near], classes[: len(near)])
            scores[len(near) :] *= 0.5
        instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.from_numpy(found.astype(np.float32))))
        instances.scores = torch.from_numpy(scores.astype(np.float32))
        instances.pred_classes = torch.from_numpy(classes)
        results.append(({"image_id": image_id}, {"instances": instances}))
    dataset = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
    }
    json_file.write_text(json.dumps(dataset))
    return results


def seconds(function: Callable[[], object]) -> tuple[float, object]:
    """Duration and result of a function, with its output suppressed."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        returned = function()
    return time.perf_counter() - start, returned


def measure(backend: str, results: list[tuple[dict, dict]], output_dir: str | None) -> tuple[float, float, dict]:
    """Seconds for processing the detections and for evaluating them, and the metrics."""
    evaluator = COCOEvaluator(NAME, APSettings(backend), distributed=False, output_dir=output_dir)
    evaluator.reset()
    processing, _ = seconds(lambda: [evaluator.process([x], [y]) for x, y in results])
    evaluating, metrics = seconds(evaluator.evaluate)
    return processing, evaluating, metrics["bbox"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="number of images (default 5000, as in val2017)")
    args = parser.parse_args()
    logging.getLogger("detectron2").setLevel(logging.WARNING)

    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder, "annotations.json")
        results = generate(args.images, json_file)
        register_coco_instances(NAME, {}, str(json_file), folder)
        DatasetCatalog.get(NAME)  # loading sets the category ids
        processing, pycocotools, expected = measure("pycocotools", results, output_dir=None)
        _, hotcoco, metrics = measure("hotcoco", results, output_dir=None)
        _, with_files, _ = measure("hotcoco", results, output_dir=folder)

    versions = {package: importlib.metadata.version(package) for package in ("pycocotools", "hotcoco")}
    print(f"{args.images} images, {CLASSES} classes, {DETECTIONS} detections each; {os.cpu_count()} CPUs\n")
    print("| part | seconds |\n| --- | --- |")
    print(f"| processing the detections, the same for both | {processing:.2f} |")
    print(f"| evaluating with pycocotools {versions['pycocotools']} | {pycocotools:.2f} |")
    print(f"| evaluating with hotcoco {versions['hotcoco']} | {hotcoco:.2f} |")
    print(f"| the same, writing detections to files as in training | {with_files:.2f} |")
    print(f"\nhotcoco is {pycocotools / hotcoco:.1f} times as fast.")
    differing = [key for key in expected if json.dumps(metrics[key]) != json.dumps(expected[key])]
    if differing:
        sys.exit(f"AP differs: {', '.join(f'{key} {expected[key]} and {metrics[key]}' for key in differing)}")
    print(f"AP is {metrics['AP']:.4f} with both; all {len(expected)} metrics are exactly equal.")


if __name__ == "__main__":
    main()
