"""hotcoco gives pycocotools' and lvis's numbers to the bit; where it does not, pycocotools computes."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import hotcoco
import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_d2.evaluation.coco import difference, evaluate_boxes
from dino_d2.lvis import LVIS, LVISEval, LVISResults
from tests.evaluation.generated import Generated, generate, generate_lvis

LVIS_REFERENCE = json.loads(Path(__file__).with_name("lvis_reference.json").read_text())


def by_pycocotools(made: Generated, max_dets: int, img_ids: list[int] | None = None) -> COCOeval:
    """As detectron2 does it: with its own summary at other numbers than 100."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO()
        annotations.dataset = copy.deepcopy(made.dataset)
        annotations.createIndex()
        evaluation = (COCOeval if max_dets == 100 else COCOevalMaxDets)(
            annotations, annotations.loadRes(copy.deepcopy(made.detections)), "bbox"
        )
        evaluation.params.maxDets = [1, 10, max_dets]
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_equal_to_the_bit(made: Generated, max_dets: int, img_ids: list[int] | None = None) -> COCOeval:
    assert difference(made.dataset, made.detections) == ""
    expected = by_pycocotools(made, max_dets, img_ids)
    got = evaluate_boxes(made.dataset, made.detections, max_dets, img_ids)
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(got.eval[name], expected.eval[name]), name
    assert np.array_equal(got.stats, expected.stats)
    return expected


@pytest.mark.parametrize("max_dets", [10, 100, 1000])
@pytest.mark.parametrize(
    ("images", "classes", "objects", "detections"),
    [(5, 1, 40, 1100), (40, 1, 7, 150), (40, 5, 7, 300), (30, 80, 7, 300), (30, 365, 15, 300)],
)
def test_arrays_and_metrics_are_pycocotools(
    images: int, classes: int, objects: int, detections: int, max_dets: int
) -> None:
    expected = assert_equal_to_the_bit(generate(images, classes, objects, detections), max_dets)
    assert 0 < expected.stats[0] < 1


def test_what_counts_changes_the_numbers_where_it_should() -> None:
    """Else the tests at 1000 detections would be those at 100."""
    made = generate(3, 1, 40, 300)
    assert by_pycocotools(made, 1000).stats[0] > by_pycocotools(made, 100).stats[0]


def change_nothing(made: Generated) -> None:
    pass


def all_scores_equal(made: Generated) -> None:
    for detection in made.detections:
        detection["score"] = 0.5


def all_crowds(made: Generated) -> None:
    for annotation in made.dataset["annotations"]:
        annotation["iscrowd"] = 1


def no_annotations(made: Generated) -> None:
    made.dataset["annotations"] = []


def one_detection(made: Generated) -> None:
    del made.detections[1:]


def ignored_without_being_crowds(made: Generated) -> None:
    for annotation in made.dataset["annotations"][::3]:
        annotation["ignore"] = 1


def boxes_without_area(made: Generated) -> None:
    made.dataset["annotations"][3]["bbox"][2] = made.dataset["annotations"][3]["area"] = 0.0
    made.detections[5]["bbox"][2] = 0.0
    made.detections[6]["bbox"][3] = -2.0


def areas_on_the_limits(made: Generated) -> None:
    for annotation, detection in zip(made.dataset["annotations"], made.detections, strict=False):
        annotation["area"] = [32**2, 96**2][annotation["id"] % 2]
        detection["bbox"][2:] = [[32.0, 32.0], [96.0, 96.0]][annotation["id"] % 2]


def unknown_category_and_image(made: Generated) -> None:
    made.detections[5]["category_id"] = 9999
    made.dataset["annotations"][3]["category_id"] = 9999
    made.dataset["annotations"][4]["image_id"] = 9999


def category_id_0(made: Generated) -> None:
    for item in (*made.dataset["annotations"], *made.detections):
        item["category_id"] -= 2
    for category in made.dataset["categories"]:
        category["id"] -= 2


Change = Callable[[Generated], None]


@pytest.mark.parametrize(
    "change",
    [
        all_scores_equal,
        all_crowds,
        no_annotations,
        one_detection,
        ignored_without_being_crowds,
        boxes_without_area,
        areas_on_the_limits,
        unknown_category_and_image,
        category_id_0,
    ],
)
def test_odd_data_is_counted_as_by_pycocotools(change: Change) -> None:
    made = generate(20, 5, 7, 60)
    change(made)
    assert_equal_to_the_bit(made, 100)


def test_some_images_alone() -> None:
    made = generate(20, 5, 7, 60)
    assert_equal_to_the_bit(made, 100, img_ids=[7, 3, 12])


# --- where it is not equal


def annotation_id_0(made: Generated) -> None:
    for annotation in made.dataset["annotations"]:
        annotation["id"] -= 1


def shared_annotation_ids(made: Generated) -> None:
    for annotation in made.dataset["annotations"]:
        annotation["id"] = 1


def nan_boxes(made: Generated) -> None:
    for detection in made.detections[::10]:
        detection |= {"bbox": [float("nan")] * 4, "score": 1.0}


@pytest.mark.parametrize(
    ("change", "reason"), [(annotation_id_0, "id 0"), (shared_annotation_ids, "duplicate ids"), (nan_boxes, "NaN")]
)
def test_what_differs_is_known(change: Change, reason: str) -> None:
    made = generate(20, 5, 7, 60)
    change(made)
    assert reason in difference(made.dataset, made.detections)
    expected, got = by_pycocotools(made, 100), evaluate_boxes(made.dataset, made.detections, 100)
    equal = [np.array_equal(got.eval[name], expected.eval[name]) for name in ("precision", "recall", "scores")]
    assert not all(equal), "hotcoco is equal now: the exception can go"


def text_image_ids(made: Generated) -> None:
    for image in made.dataset["images"]:
        image["id"] = f"{image['id']:06}"
    for item in (*made.dataset["annotations"], *made.detections):
        item["image_id"] = f"{item['image_id']:06}"


def negative_image_ids(made: Generated) -> None:
    for image in made.dataset["images"]:
        image["id"] *= -1
    for item in (*made.dataset["annotations"], *made.detections):
        item["image_id"] *= -1


def no_iscrowd(made: Generated) -> None:
    del made.dataset["annotations"][2]["iscrowd"]


def unknown_image_in_detections(made: Generated) -> None:
    made.detections[5]["image_id"] = 9999


def infinite_score(made: Generated) -> None:
    made.detections[5]["score"] = float("inf")


def nan_area(made: Generated) -> None:
    made.dataset["annotations"][2]["area"] = float("nan")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nan_area, "NaN"),
        (text_image_ids, "integer ids"),
        (negative_image_ids, "integer ids"),
        (no_iscrowd, "iscrowd"),
        (unknown_image_in_detections, "images that are not in the dataset"),
        (infinite_score, "infinite"),
    ],
)
def test_what_is_left_to_pycocotools(change: Change, reason: str) -> None:
    made = generate(20, 5, 7, 60)
    change(made)
    assert reason in difference(made.dataset, made.detections)


# --- LVIS


@pytest.mark.parametrize("case", LVIS_REFERENCE["cases"], ids=lambda case: f"{case['classes']}-{case['max_dets']}")
def test_lvis_rules_are_those_of_the_package(case: dict, tmp_path: Path) -> None:
    """The package's precision to the bit; of the metrics, its own sums in another order, all but the last digit."""
    made = generate_lvis(case["images"], case["classes"], case["objects"], case["detections"])
    (tmp_path / "lvis.json").write_text(json.dumps(made.dataset))
    annotations = LVIS(str(tmp_path / "lvis.json"))
    evaluation = LVISEval(annotations, LVISResults(annotations, made.detections, case["max_dets"]), "bbox")
    assert isinstance(evaluation, hotcoco.COCOeval)
    evaluation.run()
    precision = np.ascontiguousarray(evaluation.eval["precision"], np.float64)
    assert hashlib.sha256(precision.tobytes()).hexdigest() == case["sha256_of_precision"]
    results = evaluation.get_results()
    assert {name: results[name] for name in case["metrics"]} == pytest.approx(case["metrics"], rel=1e-14)


def test_reference_of_lvis_tells_the_rules_apart() -> None:
    """Federated annotation matters, and so does the number of detections."""
    first, second = (case["metrics"]["AP"] for case in LVIS_REFERENCE["cases"][:2])
    assert first != second
    for case in LVIS_REFERENCE["cases"]:
        assert case["metrics"]["AP"] != pytest.approx(case["ap_if_all_were_annotated"], abs=1e-3)
