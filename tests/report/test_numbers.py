"""A report finds exactly the errors that were made, and its numbers are those of pycocotools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_d2.evaluation.f1 import best_f1, matches_of_pycocotools
from dino_d2.report import ap
from dino_d2.report.dataset import read_found, read_truth
from dino_d2.report.numbers import NumbersOptions, report_numbers
from tests.evaluation.generated import Generated, generate
from tests.evaluation.test_hotcoco import by_pycocotools
from tests.report import known
from tests.report.known import IMAGES, Known, perfect

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
QUICK = NumbersOptions(resamples=0, threshold=0.3)
CASES = {
    "missed",
    "false",
    "wrong_class",
    "badly_placed",
    "duplicate",
    "second_class",
    "sure_but_wrong",
    "worst_images",
}
ERRORS = {"classification", "localization", "both", "duplicate", "background", "missed"}


def report(made: Known | Generated, folder: Path, options: NumbersOptions = QUICK) -> dict[str, Any]:
    files = Known(made.dataset, made.detections).write(folder)
    numbers = report_numbers(files, made.detections, {"machine": "a test"}, "Title", options, {"ATD100": 12.3})
    return json.loads(json.dumps(numbers, allow_nan=False))


def cases_of(numbers: dict[str, Any]) -> dict[str, list[tuple]]:
    """(id of the image, row of the object or detection) of each case, without those that are empty."""
    found: dict[str, list[tuple]] = {}
    for case, places in numbers["cases"].items():
        for image, place in places if case != "worst_images" else ():
            entry = numbers["images"][image]
            row = entry["truth" if case == "missed" else "found"][place]
            found.setdefault(case, []).append((entry["id"], row[4]))
    return found


# --- known errors


@pytest.mark.parametrize(
    ("change", "error", "cases", "cells"),
    [
        (known.rename_detection, "classification", {"missed": [(2, 0)], "wrong_class": [(2, 1)]}, [[0, 1, 1, [2]]]),
        (
            known.move_detection,
            "localization",
            {"missed": [(3, 1)], "badly_placed": [(3, 1)]},
            [[-1, 1, 1, [3]], [1, -1, 1, [3]]],
        ),
        (known.double_detection, "duplicate", {"duplicate": [(4, 2)]}, [[-1, 2, 1, [4]]]),
        (known.leave_out_detection, "missed", {"missed": [(5, 0)]}, [[0, -1, 1, [5]]]),
        (
            known.add_false_detection,
            "background",
            {"false": [(6, 2)], "sure_but_wrong": [(6, 2)]},
            [[-1, 2, 1, [6]]],
        ),
    ],
)
def test_an_error_is_found_and_nothing_else(
    change: Callable[[Known], None], error: str, cases: dict, cells: list, tmp_path: Path
) -> None:
    numbers = report(perfect().changed(change), tmp_path)
    assert cases_of(numbers) == cases
    assert [cell for cell in numbers["confusion"]["cells"] if cell[0] != cell[1]] == cells
    tide = numbers["tide"]
    assert {name for name in ERRORS if tide[name]} == {error}
    assert tide["ap50"] + tide[error] == pytest.approx(100, abs=1e-3)
    assert tide["ap50"] == pytest.approx(numbers["metrics"]["AP50"]["value"], abs=1e-3)
    assert numbers["cases"]["worst_images"] == [0]
    assert {numbers["images"][0]["id"]} == {image for found in cases.values() for image, _ in found}


def test_all_errors_at_once(tmp_path: Path) -> None:
    numbers = report(
        perfect().changed(
            known.rename_detection,
            known.move_detection,
            known.double_detection,
            known.leave_out_detection,
            known.add_false_detection,
        ),
        tmp_path,
    )
    found = {case: sorted(places) for case, places in cases_of(numbers).items()}
    assert found == {
        "missed": [(2, 0), (3, 1), (5, 0)],
        "wrong_class": [(2, 1)],
        "badly_placed": [(3, 1)],
        "duplicate": [(4, 2)],
        "false": [(6, 2)],
        "sure_but_wrong": [(6, 2)],
    }
    wrong = [cell[:3] for cell in numbers["confusion"]["cells"] if cell[0] != cell[1]]
    assert wrong == [[-1, 1, 1], [-1, 2, 2], [0, -1, 1], [0, 1, 1], [1, -1, 1]]
    right, total = 3 * IMAGES - 3, 3 * IMAGES
    assert numbers["metrics"]["recall"]["value"] == pytest.approx(100 * right / total)
    assert numbers["metrics"]["precision"]["value"] == pytest.approx(100 * right / (right + 4))
    assert numbers["metrics"]["duplicates_per_object"]["value"] == pytest.approx(1 / total)
    assert numbers["classes"][0]["confused_with"] == [[1, 1]]
    assert numbers["classes"][0]["recall"] == pytest.approx(100 * (IMAGES - 2) / IMAGES)
    assert {x["id"] for x in numbers["images"][:5]} == {2, 3, 4, 5, 6}
    assert [x["F1"] for x in numbers["images"][5:]] == [100] * (IMAGES - 5)
    assert all(numbers["tide"][error] for error in ERRORS - {"both"})


@pytest.mark.parametrize(
    ("change", "image", "kind", "label"),
    [
        (known.rename_annotation, 2, "wrong class", 0),
        (known.move_annotation, 3, "badly drawn box", 1),
        (known.double_annotation, 4, "annotated twice", 2),
        (known.leave_out_annotation, 5, "missing label", 0),
    ],
)
def test_a_label_error_is_found_and_nothing_else(
    change: Callable[[Known], None], image: int, kind: str, label: int, tmp_path: Path
) -> None:
    made = perfect().changed(change)
    numbers = report(made, tmp_path)
    (error,) = numbers["label_errors"]
    assert (numbers["images"][error["image"]]["id"], error["kind"], error["class"]) == (image, kind, label)
    category = (known.CAT, known.DOG, known.BIRD)[label]
    x, y, width, height = made.detection_of(image, category)["bbox"]
    assert error["box"] == pytest.approx([x, y, x + width, y + height], abs=1.1)
    assert ("cat", "dog", "bird")[label] in error["reason"]


def test_without_errors_nothing_is_found(tmp_path: Path) -> None:
    numbers = report(perfect(), tmp_path)
    assert cases_of(numbers) == {}
    assert (numbers["label_errors"], numbers["cases"]["worst_images"]) == ([], [])
    assert [cell[:3] for cell in numbers["confusion"]["cells"]] == [[x, x, IMAGES] for x in range(3)]
    assert numbers["metrics"]["AP"]["value"] == pytest.approx(100)
    assert {row["recall"] for rows in numbers["slices"].values() for row in rows if row["objects"]} == {100}


def test_an_unsure_detector_accuses_no_annotation(tmp_path: Path) -> None:
    made = perfect().changed(known.leave_out_annotation)
    made.detection_of(5, known.CAT)["score"] = 0.4  # above the threshold, but below most that are right
    assert report(made, tmp_path)["label_errors"] == []


def test_a_found_object_is_not_badly_drawn(tmp_path: Path) -> None:
    made = perfect().changed(known.move_annotation)
    found = made.object_of(3, known.DOG)
    made.detections.append({"image_id": 3, "category_id": known.DOG, "bbox": found["bbox"], "score": 0.7})
    numbers = report(made, tmp_path)
    assert cases_of(numbers) == {"badly_placed": [(3, 1)]}
    assert numbers["label_errors"] == []


# --- numbers


@pytest.mark.parametrize("max_dets", [10, 100])
@pytest.mark.parametrize("arguments", [(30, 5, 7, 60), (20, 1, 12, 150), (12, 80, 7, 100)])
def test_numbers_are_those_of_pycocotools(arguments: tuple, max_dets: int, tmp_path: Path) -> None:
    made = generate(*arguments)
    evaluation = by_pycocotools(made, max_dets)
    numbers = report(made, tmp_path, NumbersOptions(max_dets=max_dets, resamples=0))
    assert [numbers["metrics"][name]["value"] for name in METRICS] == [100 * x for x in evaluation.stats[:6]]
    f1, threshold = best_f1(matches_of_pycocotools(evaluation))
    assert numbers["metrics"]["F1"]["value"] == pytest.approx(100 * f1, rel=1e-12)
    assert numbers["threshold"] == {"score": threshold, "chosen": True}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for label, row in enumerate(numbers["classes"]):
        mine = precision[:, :, label]
        assert row["AP"] == (None if (mine == -1).all() else pytest.approx(100 * mine.mean(), abs=1e-4))
        assert row["AP50"] == (None if (mine == -1).all() else pytest.approx(100 * mine[0].mean(), abs=1e-4))
        assert row["pr"] is None or np.allclose(row["pr"], 100 * mine[0], atol=1e-4)
    assert max(numbers["f1"][1]) <= 100 * f1 + 1e-4
    assert numbers["metrics"]["F1"]["low"] is None
    assert numbers["dataset"]["detections_counted"] <= numbers["dataset"]["detections"] == len(made.detections)


def test_confusion_counts_every_object_and_detection_once(tmp_path: Path) -> None:
    made = generate(20, 4, 7, 40)
    numbers = report(made, tmp_path, NumbersOptions(resamples=0))
    cells = np.array([cell[:3] for cell in numbers["confusion"]["cells"]])
    assert numbers["dataset"]["objects"] == sum(not x["iscrowd"] for x in made.dataset["annotations"])
    assert numbers["dataset"]["crowds"] == sum(x["iscrowd"] for x in made.dataset["annotations"])
    for label, row in enumerate(numbers["classes"]):
        true, found = (cells[cells[:, column] == label] for column in (0, 1))
        right = cells[(cells[:, :2] == label).all(1), 2].sum()
        assert true[:, 2].sum() == row["objects"]
        assert row["recall"] == pytest.approx(100 * right / row["objects"], abs=1e-4)
        assert row["precision"] == pytest.approx(100 * right / found[:, 2].sum(), abs=1e-4)
    assert not (cells[:, :2] == -1).all(1).any()


def test_confusion_of_plain_errors_is_that_of_hotcoco(tmp_path: Path) -> None:
    changes = (known.rename_detection, known.move_detection, known.double_detection, known.leave_out_detection)
    made = perfect().changed(*changes, known.add_false_detection)
    truth = read_truth(made.write(tmp_path))
    evaluation = ap.evaluate(truth, read_found(made.detections, truth, 100), 100)
    expected = evaluation.confusion_matrix(iou_thr=0.5, min_score=0.3)["matrix"]
    mine = np.zeros_like(expected)
    for true, found, count, _ in report(made, tmp_path)["confusion"]["cells"]:
        mine[true, found] = count
    assert mine.tolist() == expected.tolist()


def test_f1_of_a_class_is_highest_at_its_threshold(tmp_path: Path) -> None:
    for row in report(generate(30, 3, 7, 40), tmp_path)["classes"]:
        thresholds, f1 = row["f1"]
        assert len(thresholds) == len(f1) == 101
        assert f1[round(100 * row["best_threshold"])] == pytest.approx(row["best_F1"], abs=3)
        assert max(f1) <= row["best_F1"] + 1e-4


def test_a_threshold_can_be_given(tmp_path: Path) -> None:
    made = generate(10, 3, 7, 40)
    numbers = report(made, tmp_path, NumbersOptions(resamples=0, threshold=0.9))
    assert numbers["threshold"] == {"score": 0.9, "chosen": False}
    sure = sum(count for _, found, count, _ in numbers["confusion"]["cells"] if found >= 0)
    assert 0 < sure <= sum(x["score"] > 0.9 for x in made.detections)


# --- pictures


@pytest.mark.parametrize(("threshold", "lowest"), [(0.3, "0.05"), (0.0162, "0.0162")])
def test_pictures_say_from_which_score_they_show_boxes(threshold: float, lowest: str, tmp_path: Path) -> None:
    made = perfect()
    made.detections[0]["score"], made.detections[1]["score"] = 0.05, 0.0162
    numbers = report(made, tmp_path, NumbersOptions(resamples=0, threshold=threshold))
    assert f"Pictures show detections that score at least {lowest}, at most 100 of an image." in numbers["left_out"]
    assert min(box[5] for image in numbers["images"] for box in image["found"]) == float(lowest)


def test_gallery_has_each_kind_of_case_when_it_is_small(tmp_path: Path) -> None:
    made = generate(60, 4, 6, 30)
    numbers = report(made, tmp_path, NumbersOptions(resamples=0, gallery=12))
    assert len(numbers["images"]) == 12
    assert all(numbers["cases"][case] for case in CASES)
    assert "12 of 60 images are shown." in numbers["left_out"]
    f1 = [image["F1"] for image in numbers["images"]]
    assert f1 == sorted(f1)
    known_cells = [cell[3] for cell in numbers["confusion"]["cells"]]
    shown = {image["id"] for image in numbers["images"]}
    assert all((ids[0] in shown) or not shown & set(ids) for ids in known_cells)  # those with pictures come first


def test_cases_point_at_what_they_name(tmp_path: Path) -> None:
    numbers = report(generate(40, 4, 6, 30), tmp_path, NumbersOptions(resamples=0))
    threshold = numbers["threshold"]["score"]
    for case in CASES - {"missed", "worst_images", "sure_but_wrong"}:
        rows = [numbers["images"][image]["found"][place] for image, place in numbers["cases"][case]]
        assert {row[6] for row in rows} == {case}
        assert min(row[5] for row in rows) >= round(threshold, 4)
        shown = sum(row[6] == case and row[5] > threshold for image in numbers["images"] for row in image["found"])
        assert len(rows) == shown
    missed = [numbers["images"][image]["truth"][place] for image, place in numbers["cases"]["missed"]]
    assert {tuple(row[5:]) for row in missed} == {(0, 0)}
    sizes = [(row[2] - row[0]) * (row[3] - row[1]) for row in missed]
    assert sizes[0] > sizes[-1]


def test_drawn_are_the_best_hundred_above_five_percent(tmp_path: Path) -> None:
    made = perfect()
    box = [1.0, 1.0, 10.0, 10.0]
    for number in range(150):
        made.detections.append({"image_id": 1, "category_id": 3, "bbox": box, "score": 0.06 + number / 1000})
        made.detections.append({"image_id": 2, "category_id": 3, "bbox": box, "score": 0.049})
    images = {image["id"]: image for image in report(made, tmp_path)["images"]}
    assert (len(images[1]["found"]), len(images[2]["found"])) == (100, 3)
    scores = [row[5] for row in images[1]["found"]]
    assert scores == sorted(scores, reverse=True)


# --- odd data


def no_annotations(made: Generated) -> None:
    made.dataset["annotations"] = []


def no_detections(made: Generated) -> None:
    made.detections.clear()


def neither(made: Generated) -> None:
    no_annotations(made)
    no_detections(made)


def all_crowds(made: Generated) -> None:
    for annotation in made.dataset["annotations"]:
        annotation["iscrowd"] = 1


def class_without_annotations(made: Generated) -> None:
    made.dataset["categories"].append({"id": 1000, "name": "never"})
    made.detections[0]["category_id"] = 1000


def text_image_ids(made: Generated) -> None:
    for image in made.dataset["images"]:
        image["id"] = f"{image['id']:04}"
    for item in (*made.dataset["annotations"], *made.detections):
        item["image_id"] = f"{item['image_id']:04}"


def no_right_one(made: Generated) -> None:
    for detection in made.detections:
        detection["bbox"] = [2000.0, 2000.0, 5.0, 5.0]


def nothing(made: Generated) -> None:
    pass


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ((10, 3, 5, 20), no_annotations),
        ((10, 3, 5, 20), no_detections),
        ((10, 3, 5, 20), neither),
        ((10, 3, 5, 20), all_crowds),
        ((10, 3, 5, 20), class_without_annotations),
        ((10, 3, 5, 20), text_image_ids),
        ((10, 3, 5, 20), no_right_one),
        ((1, 3, 5, 20), nothing),
        ((20, 365, 10, 60), nothing),
    ],
)
def test_odd_data_has_a_whole_report(arguments: tuple, change: Callable[[Generated], None], tmp_path: Path) -> None:
    made = generate(*arguments)
    change(made)
    numbers = report(made, tmp_path, NumbersOptions(resamples=20))
    assert set(numbers) == {
        *("format", "title", "made", "about", "dataset", "threshold", "metrics", "queries", "classes", "f1", "tide"),
        *("placement", "confusion", "calibration", "slices", "images", "cases", "label_errors", "left_out"),
    }
    assert set(numbers["cases"]) == CASES
    assert len(numbers["classes"]) == len(made.dataset["categories"])
    assert len(numbers["images"]) == len(made.dataset["images"])
    objects = numbers["dataset"]["objects"]
    assert (numbers["metrics"]["AP"]["value"] is None) == (objects == 0)
    assert (numbers["tide"]["ap50"] is None) == (objects == 0)
    if objects and change in (no_detections, no_right_one):
        assert numbers["metrics"]["AP"] == {"value": 0, "low": 0, "high": 0}
        assert not numbers["threshold"]["chosen"]
    without = [row for row in numbers["classes"] if not row["objects"]]
    assert {row["AP"] for row in without} <= {None}
    if change is class_without_annotations:
        assert [row["name"] for row in without] == ["never"]
    if len(numbers["images"]) == 1:
        assert numbers["metrics"]["AP"]["low"] is None
        assert "There are no intervals: they need two images." in numbers["left_out"]


def test_ids_that_pycocotools_never_finds_are_said(tmp_path: Path) -> None:
    made = perfect()
    for annotation in made.dataset["annotations"]:
        annotation["id"] -= 1
    numbers = report(made, tmp_path)
    assert numbers["metrics"]["AP"]["value"] == pytest.approx(100)
    assert any("id 0" in sentence for sentence in numbers["left_out"])


@pytest.mark.parametrize("text", ["no such file", "no JSON"])
def test_bad_annotations_are_named(text: str, tmp_path: Path) -> None:
    files = perfect().write(tmp_path)
    if text == "no JSON":
        files.annotations.write_text("[")
    else:
        files.annotations.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"val\.json"):
        report_numbers(files, [], {}, "", QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "image_id 99, which the annotations do not have"),
        ({"category_id": 1}, "category_id 1, which the annotations do not have"),
        ({"score": 1.5}, r"must be in \[0, 1\]"),
        ({"score": float("nan")}, "infinite or NaN"),
        ({"bbox": [0, 0, float("inf"), 1]}, "infinite or NaN"),
        ({"bbox": [0, 0, 1]}, "results format"),
        ({"bbox": None}, "results format"),
        ({"score": "high"}, "results format"),
    ],
)
def test_bad_detections_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    made = perfect()
    made.detections[3].update(change)
    with pytest.raises(ValueError, match=message):
        report_numbers(made.write(tmp_path), made.detections, {}, "", QUICK)


@pytest.mark.parametrize("lacking", [{"area": None, "iscrowd": None}, {}], ids=["null", "missing"])
def test_missing_area_is_that_of_the_box(lacking: dict[str, None], tmp_path: Path) -> None:
    made = perfect()
    whole = report_numbers(made.write(tmp_path), made.detections, {}, "", QUICK)
    for annotation in made.dataset["annotations"]:
        del annotation["area"], annotation["iscrowd"]
        annotation |= lacking
    numbers = report_numbers(made.write(tmp_path), made.detections, {}, "", QUICK)
    assert numbers["metrics"] == whole["metrics"]
    assert any("no area or iscrowd" in sentence for sentence in numbers["left_out"])


@pytest.mark.parametrize(("key", "value"), [("bbox", [0, 0, float("nan"), 1]), ("bbox", None)])
def test_bad_objects_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    made = perfect()
    made.dataset["annotations"][2][key] = value
    with pytest.raises(ValueError, match=r"val\.json.*dino-d2 check lists"):
        report_numbers(made.write(tmp_path), made.detections, {}, "", QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_dets": 9}, "max_dets is 9"), ({"threshold": 1.0}, "threshold is 1"), ({"resamples": -1}, "negative")],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NumbersOptions(**options)
