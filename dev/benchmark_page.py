#!/usr/bin/env python3
"""Time a report, from the files to the page with its pictures, on a generated dataset of val2017's size.

    dev/benchmark_page.py                    5,000 images, 300 detections each, with and without intervals
    dev/benchmark_page.py --images 500

Prints a Markdown table of seconds and peak memory, each measured in a process of its own. Reading the files is part of
it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmark_evaluation import CLASSES, DETECTIONS, HEIGHT, OBJECTS, WIDTH, boxes
from dino_d2.data import CocoFiles
from dino_d2.report.evaluated import Evaluated
from dino_d2.report.make import make_comparison, make_report
from dino_d2.report.numbers import NumbersOptions

SPAWN = multiprocessing.get_context("spawn")
DETECTIONS_COUNTED = 100  # per image and class, COCO's
CASES = ("imports", "report without intervals", "report", "comparison")


def write(file: Path, images: int) -> None:
    """Write annotations, and beside them the images, and A.json and B.json, the detections of two models."""
    write_annotations(file, images)
    write_images(file.parent, images)
    for name, noise in (("A", 0.1), ("B", 0.08)):
        file.with_name(f"{name}.json").write_text(json.dumps(detect(file, noise)))


def write_annotations(file: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, images + 1):
        for x1, y1, x2, y2 in boxes(rng, rng.poisson(OBJECTS)).tolist():
            sides, label = (x2 - x1, y2 - y1), int(rng.integers(CLASSES))
            entry = {"bbox": [x1, y1, *sides], "area": sides[0] * sides[1], "iscrowd": 0, "category_id": label + 1}
            annotations.append(entry | {"id": len(annotations) + 1, "image_id": image_id})
    content = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
    }
    file.write_text(json.dumps(content))


def write_images(folder: Path, images: int) -> None:
    """JPEG of usual size; the same picture under every name."""
    noise = np.random.default_rng(2).integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8)
    first = folder / "1.jpg"
    Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(first, quality=90)
    for number in range(2, images + 1):
        os.link(first, folder / f"{number}.jpg")


def detect(file: Path, noise: float) -> list[dict]:
    """A third of the detections are near an object, most of these with its class; the rest are anywhere."""
    rng = np.random.default_rng(1)
    content = json.loads(file.read_text())
    truth: dict[int, list] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        truth[entry["image_id"]].append((*entry["bbox"], entry["category_id"]))
    detections = []
    for image_id, objects in truth.items():
        found = boxes(rng, DETECTIONS)
        found[:, 2:] -= found[:, :2]
        labels, scores = rng.integers(1, CLASSES + 1, DETECTIONS), rng.random(DETECTIONS) ** 3
        if objects:
            near = np.arange(DETECTIONS // 3)
            here = np.array(objects)[near % len(objects)]
            sizes = np.tile(here[:, 2:4], 2)
            found[near] = here[:, :4] + rng.normal(0, noise, (len(near), 4)) * sizes
            found[near, 2:] = np.maximum(found[near, 2:], 1)
            labels[near] = np.where(rng.random(len(near)) < 0.8, here[:, 4], labels[near])
            first = near < len(objects)
            scores[near] = np.where(first, 1 - scores[near], scores[near])
        rows = zip(found.tolist(), labels.tolist(), scores.tolist(), strict=True)
        detections += [{"image_id": image_id, "bbox": x, "category_id": c, "score": s} for x, c, s in rows]
    return detections


def measure(case: str, file: Path) -> tuple[float, ...]:
    """Seconds, seconds of all cores, peak gigabytes and the size of the page in megabytes."""
    options, folder = NumbersOptions(resamples=1000 if "intervals" not in case else 0), file.parent / case
    files, size = CocoFiles(file, file.parent), 0
    start, cores = time.perf_counter(), time.process_time()
    models = [Evaluated(name, files, file.with_name(f"{name}.json"), DETECTIONS_COUNTED, {}) for name in "AB"]
    if case == "comparison":
        size = make_comparison(*models, folder, options).stat().st_size
    elif case != "imports":
        size = make_report(models[0], folder, options).stat().st_size
    seconds, cores = time.perf_counter() - start, time.process_time() - cores
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return seconds, cores, peak, size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="number of images (default 5000, as in val2017)")
    parser.add_argument("--case", choices=CASES, help="only this one")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"{args.images} images, {DETECTIONS} detections each, {CLASSES} classes; {os.cpu_count()} CPUs, load {load:.1f}"
    )
    print(
        "\n| part | seconds | CPU seconds | peak memory (GB) | page (MB) |\n| --- | ---: | ---: | ---: | ---: |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "annotations.json")
        with ProcessPoolExecutor(1, mp_context=SPAWN) as process:  # a process's peak includes that of its parent
            process.submit(write, file, args.images).result()
        for case in [args.case] if args.case else CASES:
            with ProcessPoolExecutor(1, mp_context=SPAWN) as process:
                seconds, cores, peak, size = process.submit(measure, case, file).result()
            print(f"| {case} | {seconds:.1f} | {cores:.1f} | {peak:.2f} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
