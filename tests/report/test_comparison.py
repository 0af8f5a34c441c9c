"""A comparison tells models apart that differ, and no others."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from dino_d2.report.comparison import compare_numbers
from dino_d2.report.numbers import NumbersOptions, report_numbers
from tests.evaluation.generated import generate
from tests.evaluation.test_hotcoco import by_pycocotools
from tests.report.known import DOG, Known, add_false_detection, leave_out_detection, perfect

OPTIONS = NumbersOptions(resamples=200)


def compare(dataset: dict, first: list, second: list, folder: Path, options: NumbersOptions = OPTIONS) -> dict:
    files = Known(dataset, first).write(folder)
    return json.loads(json.dumps(compare_numbers(files, ("old", first), ("new", second), options), allow_nan=False))


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    made = generate(30, 3, 7, 30)
    numbers = compare(made.dataset, made.detections, made.detections, tmp_path)
    for row in (*numbers["metrics"].values(), *numbers["classes"]):
        assert (row["difference"], row["low"], row["high"], row["significant"]) == (0, 0, 0, False)
    assert "not significant" in numbers["verdict"]
    assert (numbers["better"], numbers["worse"]) == ([], [])
    assert numbers["names"] == ["old", "new"]
    assert numbers["images"] == []
    assert "30 images on which both have the same F1 are not shown." in numbers["left_out"]


def test_a_clear_improvement_is_significant(tmp_path: Path) -> None:
    made = generate(40, 3, 7, 30)
    better = [
        {"image_id": x["image_id"], "category_id": x["category_id"], "bbox": x["bbox"], "score": 0.9}
        for x in made.dataset["annotations"]
    ]
    numbers = compare(made.dataset, made.detections, better, tmp_path)
    row = numbers["metrics"]["AP"]
    assert row["a"] == 100 * by_pycocotools(made, 100).stats[0]
    assert row["difference"] == row["b"] - row["a"] > row["low"] > 0
    assert row["high"] > row["difference"]
    assert row["significant"]
    assert numbers["verdict"].startswith(f"new is better by {row['difference']:.1f} AP (95 % interval {row['low']:.1f}")
    assert all(x["significant"] for x in numbers["classes"])

    turned = compare(made.dataset, better, made.detections, tmp_path)
    assert turned["metrics"]["AP"]["difference"] == -row["difference"]
    assert turned["metrics"]["AP"]["significant"]
    assert turned["verdict"].startswith("old is better by ")
    assert len(turned["worse"]) == len(numbers["better"]) > 0


def test_pairs_of_samples_see_small_differences(tmp_path: Path) -> None:
    """Images are easy or hard for both models, so the difference is known better than each AP."""
    made = generate(60, 2, 7, 30)
    second = copy.deepcopy(made.detections)
    for detection in second[::2]:
        detection["bbox"][0] += 0.15 * detection["bbox"][2]
    files = Known(made.dataset, second).write(tmp_path)
    alone = report_numbers(files, second, {}, "", OPTIONS)["metrics"]["AP"]
    row = compare(made.dataset, made.detections, second, tmp_path)["metrics"]["AP"]
    assert row["low"] < row["difference"] < row["high"] < 0
    assert row["high"] - row["low"] < 0.6 * (alone["high"] - alone["low"])
    assert alone["low"] < row["a"] < alone["high"]  # what the interval of the second alone would not tell apart
    assert row["significant"]


def test_images_that_changed_come_first(tmp_path: Path) -> None:
    made = perfect()
    numbers = compare(
        made.dataset,
        made.changed(leave_out_detection).detections,  # in image 5
        made.changed(add_false_detection).detections,  # in image 6
        tmp_path,
        NumbersOptions(resamples=0, threshold=0.3),
    )
    images = numbers["images"]
    assert [[images[x]["id"] for x in numbers[key]] for key in ("better", "worse")] == [[5], [6]]
    better, worse = images[numbers["better"][0]], images[numbers["worse"][0]]
    assert (better["F1_a"], better["F1_b"]) == (80, 100)
    assert (better["found_by_a"], [row[5] for row in better["truth"]]) == ([0, 1, 1], [1, 1, 1])
    assert [row[6] for row in worse["found_b"]] == ["false", "right", "right", "right"]
    assert [row[6] for row in worse["found_a"]] == ["right"] * 3
    assert len(images) == 2
    assert "6 images on which both have the same F1 are not shown." in numbers["left_out"]
    assert "2 of 8 images are shown." not in numbers["left_out"]
    assert numbers["metrics"]["AP"]["low"] is None
    assert not numbers["metrics"]["AP"]["significant"]
    assert "without an interval" in numbers["verdict"]


def test_pictures_of_both_models_begin_at_the_lower_threshold(tmp_path: Path) -> None:
    """A threshold that the slider chooses is one for both."""
    made = perfect()
    faint = [x | {"score": x["score"] / 50} for x in made.detections]  # all right, so the threshold is about 0.012
    worse = made.changed(leave_out_detection)  # in image 5, which so differs
    first = [*worse.detections, worse.detection_of(5, DOG) | {"score": 0.014}]
    numbers = compare(made.dataset, first, faint, tmp_path, NumbersOptions(resamples=0))
    lowest = min(numbers["thresholds"])
    assert lowest < 0.012 < 0.05 < max(numbers["thresholds"])
    assert f"Pictures show detections that score at least {lowest:.3g}, at most 100 of an image." in numbers["left_out"]
    (changed,) = numbers["images"]
    assert [len(changed[f"found_{name}"]) for name in "ab"] == [3, 3]


@pytest.mark.parametrize("which", ["annotations", "detections"])
def test_comparison_without_data(which: str, tmp_path: Path) -> None:
    made = generate(5, 3, 5, 10)
    if which == "annotations":
        made.dataset["annotations"] = []
        assert "nothing to compare" in compare(made.dataset, made.detections, made.detections, tmp_path)["verdict"]
    else:
        numbers = compare(made.dataset, [], made.detections, tmp_path)
        assert numbers["metrics"]["AP"]["a"] == 0 < numbers["metrics"]["AP"]["b"]
