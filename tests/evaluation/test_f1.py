"""The score threshold of the highest F1 is that of a search through all of them, matched anew."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools import mask

from dino_d2.evaluation import APSettings, COCOEvaluator
from dino_d2.evaluation.coco import evaluate_boxes
from dino_d2.evaluation.f1 import Matches, best_f1, matches_of_pycocotools
from tests.evaluation.generated import Generated, detect, generate
from tests.evaluation.test_hotcoco import (
    all_crowds,
    all_scores_equal,
    annotation_id_0,
    boxes_without_area,
    by_pycocotools,
    change_nothing,
    ignored_without_being_crowds,
    no_annotations,
    one_detection,
    unknown_category_and_image,
)


def f1_above(made: Generated, threshold: float) -> Fraction | None:
    """Matched from the beginning with what scores more: nothing is shared with the code that is tested."""
    right = wrong = total = 0
    known = {x["id"] for x in made.dataset["categories"]}
    for image in made.dataset["images"]:
        for category in known:
            here = [
                x for x in made.dataset["annotations"] if (x["image_id"], x["category_id"]) == (image["id"], category)
            ]
            objects, crowds = ([x["bbox"] for x in here if x["iscrowd"] == kind] for kind in (0, 1))
            found = [
                x
                for x in made.detections
                if (x["image_id"], x["category_id"]) == (image["id"], category) and x["score"] > threshold
            ]
            total += len(objects)
            for detection in sorted(found, key=lambda x: -x["score"])[:100]:
                overlap = list(mask.iou([detection["bbox"]], objects, [0] * len(objects))[0]) if objects else []
                inside = list(mask.iou([detection["bbox"]], crowds, [1] * len(crowds))[0]) if crowds else []
                best = max(range(len(overlap)), key=lambda i: (overlap[i], i), default=None)
                if best is not None and overlap[best] >= 0.5:
                    right += 1
                    del objects[best]
                elif max(inside, default=0) < 0.5:
                    wrong += 1
    return Fraction(2 * right, right + wrong + total) if total else None


def by_search(made: Generated) -> tuple[float, float]:
    """F1 at every threshold that tells detections apart."""
    scores = sorted({x["score"] for x in made.detections if x["score"] > 0} | {0.0})
    middles = [(low + high) / 2 for low, high in zip(scores, scores[1:], strict=False)]
    f1 = {middle: f1_above(made, middle) for middle in middles}
    if not f1 or None in f1.values():
        return math.nan, math.nan
    best = max(f1.values())
    return float(best), min(middle for middle in middles if f1[middle] == best) if best else math.nan


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("images", "classes", "objects", "detections"), [(4, 1, 6, 30), (6, 4, 5, 25)])
def test_threshold_is_that_of_a_search(images: int, classes: int, objects: int, detections: int, seed: int) -> None:
    made = generate(images, classes, objects, detections, seed)
    expected = by_search(made)
    assert best_f1(matches_of_pycocotools(by_pycocotools(made, 100))) == expected
    assert best_f1(evaluate_boxes(made.dataset, made.detections, 100).eval["matches"]) == expected
    assert 0 < expected[0] < 1


def no_right_one(made: Generated) -> None:
    for detection in made.detections:
        detection["bbox"] = [2000.0, 2000.0, 5.0, 5.0]


def scores_of_zero(made: Generated) -> None:
    for detection in made.detections[::2]:
        detection["score"] = 0.0


def adjacent_scores(made: Generated) -> None:
    """As near as the scores of a model can be: float32."""
    for number, detection in enumerate(made.detections):
        detection["score"] = float(np.float32(0.5) + np.spacing(np.float32(0.5)) * (number % 50))


@pytest.mark.parametrize(
    "change",
    [
        all_scores_equal,
        all_crowds,
        no_annotations,
        one_detection,
        no_right_one,
        scores_of_zero,
        adjacent_scores,
        ignored_without_being_crowds,
        boxes_without_area,
        unknown_category_and_image,
    ],
)
def test_threshold_of_odd_data(change: Callable[[Generated], None]) -> None:
    made = generate(5, 3, 5, 20)
    change(made)
    expected = by_search(made)
    assert best_f1(matches_of_pycocotools(by_pycocotools(made, 100))) == pytest.approx(expected, abs=0, nan_ok=True)
    matches = evaluate_boxes(made.dataset, made.detections, 100).eval["matches"]
    assert best_f1(matches) == pytest.approx(expected, abs=0, nan_ok=True)


@pytest.mark.parametrize("max_dets", [10, 100, 1000])
@pytest.mark.parametrize(("images", "classes", "objects", "detections"), [(5, 1, 40, 600), (30, 80, 7, 100)])
def test_both_programs_match_alike(images: int, classes: int, objects: int, detections: int, max_dets: int) -> None:
    made = generate(images, classes, objects, detections)
    theirs = matches_of_pycocotools(by_pycocotools(made, max_dets))
    ours = evaluate_boxes(made.dataset, made.detections, max_dets).eval["matches"]
    assert ours.objects == theirs.objects
    assert sorted(zip(ours.scores, ours.right, strict=True)) == sorted(zip(theirs.scores, theirs.right, strict=True))


def test_some_images_alone() -> None:
    made, some = generate(20, 5, 7, 60), [7, 3, 12]
    theirs = best_f1(matches_of_pycocotools(by_pycocotools(made, 100, some)))
    assert best_f1(evaluate_boxes(made.dataset, made.detections, 100, some).eval["matches"]) == theirs
    assert theirs != best_f1(evaluate_boxes(made.dataset, made.detections, 100).eval["matches"])


@pytest.mark.parametrize(
    ("scores", "right", "objects", "f1", "threshold"),
    [
        ([0.9, 0.5], [True, False], 1, 1.0, 0.7),
        ([0.5, 0.9], [False, True], 1, 1.0, 0.7),  # whatever their order
        ([0.9, 0.5], [True, True], 2, 1.0, 0.25),  # all of them
        ([0.9, 0.9], [True, False], 1, 2 / 3, 0.45),  # equal ones count together
        ([0.9, 0.8, 0.7, 0.6, 0.5], [True, False, False, False, True], 3, 0.5, 0.25),  # as good as 0.85, and shows more
        ([0.9], [False], 1, 0.0, math.nan),
        ([], [], 1, 0.0, math.nan),
        ([], [], 0, math.nan, math.nan),
        ([0.9], [False], 0, math.nan, math.nan),
    ],
)
def test_threshold_by_hand(scores: list, right: list, objects: int, f1: float, threshold: float) -> None:
    found = best_f1(Matches(np.array(scores, float), np.array(right, bool), objects))
    assert found == pytest.approx((f1, threshold), nan_ok=True)


# --- in the results of the evaluator


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize("change", [change_nothing, annotation_id_0])
def test_evaluator_reports_it_beside_ap(backend: str, change: Callable[[Generated], None], tmp_path: Path) -> None:
    made = generate(5, 2, 5, 20)
    change(made)
    for detection in made.detections:  # as they come out of the evaluator's tensors
        detection["score"] = float(np.float32(detection["score"]))
    metrics = evaluated(made, APSettings(backend), tmp_path)
    expected = best_f1(matches_of_pycocotools(by_pycocotools(made, 100)))
    assert (metrics["F1"], metrics["score_threshold"]) == (100 * expected[0], expected[1])


def test_evaluator_has_none_without_detections(tmp_path: Path) -> None:
    metrics = evaluated(generate(3, 2, 3, 0), APSettings(), tmp_path)
    assert [metrics["F1"], metrics["score_threshold"]] == pytest.approx([math.nan] * 2, nan_ok=True)


def test_metrics_have_the_same_names_without_detections(tmp_path: Path) -> None:
    with_some, without = (evaluated(generate(3, 2, 3, count), APSettings(), tmp_path) for count in (5, 0))
    assert list(with_some) == list(without)


def evaluated(made: Generated, settings: APSettings, folder: Path) -> dict[str, Any]:
    name, json_file = f"f1_{folder.name}", folder / "annotations.json"
    json_file.write_text(json.dumps(made.dataset))
    register_coco_instances(name, {}, str(json_file), str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            DatasetCatalog.get(name)  # loading is what makes the category ids known
            return detect(COCOEvaluator(name, settings), made)["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
