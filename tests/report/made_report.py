"""Reports that are made up: valid in every key, small, and with names that a careless page would trip over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NASTY = ['<b>cat</b> & "co"', "</script><script>alert(1)</script>", "собака 狗", "$x$ 'cup'"]
WIDTH, HEIGHT = 160, 120
THRESHOLD = 0.4
HERE, THERE, NEAR = [10, 10, 30, 30], [80, 40, 140, 100], [12, 12, 32, 32]
RECALLS = np.linspace(0, 1, 101)


def made_report(images: int = 8, classes: int = 4) -> dict[str, Any]:
    """A report of `images` gallery images and `classes` classes, of which the last has no objects.

    Every image has an object of class 0 that is found twice, and an object of class 1 that is found as class 2 with a
    sure score and, with a score of 0.1, as itself. The last has one more object of class 1, which is missed.
    """
    return {
        "format": 1,
        "title": "Trees & <shrubs>",
        "made": "2026-11-29 12:00",
        "about": {"weights": "model_final.pth 0123abcd", "config": "89ef", "machine": "2 cores", "versions": "torch 2"},
        "dataset": {
            "images": images,
            "objects": 2 * images,
            "crowds": 1,
            "detections": 4 * images,
            "detections_counted": 4 * images,
            "max_dets": 100,
        },
        "threshold": {"score": THRESHOLD, "chosen": True},
        "metrics": {
            "AP": {"value": 51.23, "low": 48.0, "high": 54.1},
            **{name: {"value": 40.0 + i, "low": None, "high": None} for i, name in enumerate(("AP50", "AP75", "APs"))},
            "APm": {"value": None, "low": None, "high": None},
            **{name: {"value": 60.0, "low": 55.0, "high": 65.0} for name in ("APl", "F1", "precision", "recall")},
            "duplicates_per_object": {"value": 0.5, "low": None, "high": None},
        },
        "queries": {"ATD100": 12.3, "duplicates": 0.2} | {f"AP_layer{i}": 40.0 + i for i in range(1, 7)},
        "classes": [_class(i, i == classes - 1) for i in range(classes)],
        "f1": [RECALLS.tolist(), (60 - 100 * (RECALLS - THRESHOLD) ** 2).tolist()],
        "tide": {
            "ap50": 40.0,
            **{"classification": 8.1, "localization": 3.0, "both": 0.4},
            **{"duplicate": 5.0, "background": 1.0, "missed": 0.0, "false_positives": 9.0, "false_negatives": 4.0},
        },
        "placement": {
            "boxes": 2 * images,
            "x": {"value": -14.2, "low": -17.0, "high": -12.1},
            **{name: {"value": 0.5, "low": -1.0, "high": 2.0} for name in ("y", "width", "height")},
        },
        "confusion": {
            "cells": [
                *([i, i, 5 + i, list(range(1, 4))] for i in range(classes - 1)),
                [1, 2, images, list(range(1, min(images, 20) + 1))],
                [1, -1, 2, [images, 999]],
                [-1, 0, images, list(range(1, min(images, 20) + 1))],
            ]
        },
        "calibration": {
            "bins": [
                {
                    "low": i / 10,
                    "high": (i + 1) / 10,
                    "count": 10 * i,
                    "score": i / 10 + 0.05 if i else None,
                    "precision": i / 12 if i else None,
                }
                for i in range(10)
            ],
            "error": 0.0712,
        },
        "slices": {
            group: [
                {"name": f"{name} {group}", "objects": 9, "found": 6, "recall": 66.7, "AP": ap, "low": 40, "high": 90}
                for name, ap in (("small", 30.0), ("large", None))
            ]
            for group in ("size", "aspect ratio", "crowding", "border")
        },
        "images": [_image(i, missed=i == images - 1) for i in range(images)],
        "cases": {
            "missed": [*([i, 1] for i in range(images)), *([i, 3] for i in range(images)[-1:])],
            "false": [],
            "wrong_class": [[i, 1] for i in range(images)],
            "badly_placed": [],
            "duplicate": [[i, 2] for i in range(images)],
            "second_class": [],
            "sure_but_wrong": [[i, 1] for i in range(images)][-1:],
            "worst_images": list(reversed(range(images))),
        },
        "label_errors": [
            {
                "image": 0,
                "box": [100.0, 5.0, 150.0, 30.0],
                "class": 1,
                "score": 0.97,
                "kind": "missing label",
                "reason": "Found with a score of 0.97 where nothing is annotated.",
            }
        ][:images],
        "left_out": ["Images beyond the 8 of the gallery."],
    }


def made_curves() -> dict[str, dict[str, dict[int, float]]]:
    """Two runs of 1,000 recorded iterations, with one evaluation each quarter."""
    return {
        name: {
            "total_loss": {i: 9 * rate ** (i / 100) + 1 for i in range(1000)},
            "bbox/AP": {249: 10.0, 499: 31.0, 749: 30.0, 999: 29.0},
            "lr_rest": {i: 1e-4 if i < 800 else 1e-5 for i in range(1000)},
        }
        for name, rate in (("first <run>", 0.7), ("second", 0.8))
    }


def made_robustness() -> dict[str, Any]:
    return {
        "corruptions": {"gaussian_noise": [40.0, 33.0, 21.0, 10.0, 2.0], "fog": [45.0, 43.0, 41.0, None, 30.0]},
        "clean": 51.2,
        "mPC": 29.4,
        "rPC": 57.4,
        "sizes": {"0.25": 11.0, "0.5": 33.0, "1.0": 51.2, "2.0": 44.0},
    }


def taken_for_each_other() -> list[list]:
    """Cells of the confusion matrix of 60 classes, of which the first 40 are most confused: class 0 is found as itself
    and as each of the last 20, and all others as it."""
    return [
        [0, 0, 10, [1]],
        [0, -1, 10, [1]],
        *([0, other, 1, [1]] for other in range(40, 60)),
        *([other, 0, 100, [1]] for other in range(1, 40)),
        *([-1, other, 3 if other == 0 else 5, [1]] for other in (0, 59)),
    ]


def made_comparison(images: int = 4) -> dict[str, Any]:
    """Two detectors: the second is better by 4 AP, which is significant, and by 0.5 in class 0, which is not."""
    gallery = []
    for image in (_image(i) for i in range(images)):
        found = image.pop("found")
        gallery.append(
            image | {"found_a": found, "found_b": found[:1], "found_by_a": [1, 0, 0], "F1_a": 50.0, "F1_b": 66.7}
        )
    significant = {"a": 40.0, "b": 44.0, "difference": 4.0, "low": 1.0, "high": 7.0, "significant": True}
    doubtful = {"a": 40.0, "b": 40.5, "difference": 0.5, "low": -2.0, "high": 3.0, "significant": False}
    unknown = {"a": None, "b": None, "difference": None, "low": None, "high": None, "significant": False}
    return {
        "format": 1,
        "made": "2026-11-29 12:00",
        "names": ["first <run>", "second & last"],
        "dataset": {"images": images, "objects": 2 * images, "crowds": images, "max_dets": 100},
        "thresholds": [0.4, 0.3],
        "metrics": {"AP": significant, "AP50": doubtful, "APs": unknown},
        "classes": [
            {"name": NASTY[0], "objects": 9} | doubtful,
            {"name": NASTY[1], "objects": 7} | significant,
            {"name": NASTY[2], "objects": 0} | unknown,
        ],
        "verdict": "second & last is better by 4.0 AP (95 % interval 1.0 to 7.0).",
        "images": gallery,
        "better": [0, 1],
        "worse": [2],
        "left_out": [],
    }


def write_pictures(numbers: dict[str, Any], folder: Path) -> Path:
    """The pictures of a report, of noise, in a new folder."""
    rng = np.random.default_rng(0)
    for image in numbers["images"]:
        path = folder / image["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(120, 30, (image["height"], image["width"], 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def _class(index: int, empty: bool) -> dict[str, Any]:
    name = NASTY[index] if index < len(NASTY) else f"class {index}"
    if empty:
        values = dict.fromkeys(("AP", "AP_low", "AP_high", "AP50", "precision", "recall", "best_threshold", "best_F1"))
        return {"name": name, "objects": 0, "images": 0, **values, "confused_with": [], "pr": None, "f1": None}
    best = 0.3 + 0.1 * (index % 4)
    return {
        "name": name,
        "objects": 10 * (index + 1),
        "images": 8,
        **{"AP": 50.0 - index % 40, "AP_low": 45.0 - index % 40, "AP_high": 55.0 - index % 40, "AP50": 70.0},
        **{"precision": 80.0, "recall": 60.0 + index % 20, "best_threshold": best, "best_F1": 70.0},
        "confused_with": [[(index + 1) % 3, 4]],
        "pr": (100 - 100 * RECALLS**2).tolist(),
        "f1": [RECALLS.tolist(), (70 - 100 * (RECALLS - best) ** 2).tolist()],
    }


def _image(index: int, missed: bool = False) -> dict[str, Any]:
    more = [[5, 90, 25, 115, 1, 0, 0]] if missed else []
    return {
        "id": index + 1,
        "file": f"folder/{index + 1} <a> & 'b' #1 狗.png",
        "width": WIDTH,
        "height": HEIGHT,
        "F1": 40.0,
        "objects": 2 + len(more),
        "truth": [[*HERE, 0, 1, 0], [*THERE, 1, 0, 0], [0, 0, 40, 20, 2, 0, 1], *more],
        "found": [
            [*HERE, 0, 0.9, "right"],
            [*THERE, 2, 0.8, "wrong_class"],
            [*NEAR, 0, 0.6, "duplicate"],
            [*THERE, 1, 0.1, "right"],
        ],
    }
