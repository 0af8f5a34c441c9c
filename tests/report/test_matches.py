"""Matching in one go is pycocotools' matching, and kinds of detections are as defined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dino_d2.data import CocoFiles
from dino_d2.report import matches as module
from dino_d2.report.dataset import Found, Truth, rank_in_group, read_found, read_truth
from dino_d2.report.errors import KINDS, judge
from dino_d2.report.matches import AREAS, IGNORED, RIGHT, Pairs, match, overlapping, take_in_turn
from dino_d2.report.slices import neighbours, slices
from tests.evaluation.generated import Generated, generate
from tests.evaluation.test_hotcoco import (
    all_crowds,
    all_scores_equal,
    areas_on_the_limits,
    boxes_without_area,
    by_pycocotools,
    change_nothing,
)
from tests.report.known import Known, perfect

HERE, THERE = [10, 10, 20, 20], [50, 40, 30, 30]  # x, y, width, height
NEAR = [12, 10, 20, 20]  # IoU with HERE: 18 / 22
FAR = [18, 10, 20, 20]  # 12 / 28
OTHER, BETWEEN = FAR, [14, 10, 20, 20]  # as far from HERE as from OTHER


def read(made: Generated | Known, folder: Path, max_dets: int = 100) -> tuple[Truth, Found]:
    file = folder / "val.json"
    file.write_text(json.dumps(made.dataset))
    truth = read_truth(CocoFiles(file, folder))
    return truth, read_found(made.detections, truth, max_dets)


@pytest.mark.parametrize("max_dets", [10, 100])
@pytest.mark.parametrize(
    "change", [change_nothing, all_crowds, all_scores_equal, areas_on_the_limits, boxes_without_area]
)
@pytest.mark.parametrize("arguments", [(12, 3, 9, 60), (6, 1, 30, 200)])
def test_matches_are_those_of_pycocotools(
    arguments: tuple, change: object, max_dets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 500)  # several parts
    made = generate(*arguments)
    change(made)
    truth, found = read(made, tmp_path, max_dets)
    matches = match(truth, found, overlapping(truth, found))
    areas = [list(limits) for limits in AREAS.values()]
    seen = 0
    for theirs in by_pycocotools(made, max_dets).evalImgs:
        if theirs is None:
            continue
        image, label = truth.ids.index(theirs["image_id"]), truth.category_ids.index(theirs["category_id"])
        area = areas.index([int(x) for x in theirs["aRng"]])
        mine = matches.status[area][:, (found.image == image) & (found.label == label)]
        assert np.array_equal(mine == IGNORED, theirs["dtIgnore"] > 0)
        assert np.array_equal(mine == RIGHT, (theirs["dtMatches"] > 0) & (theirs["dtIgnore"] == 0))
        counted = matches.counted[area, (truth.image == image) & (truth.label == label)]
        assert counted.sum() == (np.array(theirs["gtIgnore"]) == 0).sum()
        seen += mine.shape[1]
    assert seen == len(AREAS) * len(found)


def test_detections_take_turns() -> None:
    pairs = Pairs(np.array([0, 0, 1, 2, 2, 3]), np.array([1, 0, 1, 1, 0, 2]), np.ones(6))
    groups, shared = np.array([5, 5, 5, 8]), np.zeros(3, bool)
    assert take_in_turn(pairs, groups, shared).tolist() == [1, -1, 0, 2]
    shared[1] = True
    assert take_in_turn(pairs, groups, shared).tolist() == [1, 1, 1, 2]


def test_rank_in_group() -> None:
    assert rank_in_group(np.array([7, 2, 7, 7, 2])).tolist() == [0, 0, 1, 2, 1]
    assert rank_in_group(np.zeros(0, int)).tolist() == []


def image_with(truth: list[tuple], detections: list[tuple]) -> Known:
    """An image with (category, box) or (category, box, crowd), and detections (category, box, score)."""
    annotations = [
        {"id": number, "image_id": 1, "category_id": category, "bbox": box, "iscrowd": int(bool(crowd)), "area": 400}
        for number, (category, box, *crowd) in enumerate(truth, start=1)
    ]
    images = [{"id": 1, "file_name": "1.png", "width": 100, "height": 80}]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "bird"}]
    found = [{"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in detections]
    return Known({"images": images, "annotations": annotations, "categories": categories}, found)


@pytest.mark.parametrize(
    ("truth", "detections", "kinds"),
    [
        ([(3, HERE)], [(3, NEAR, 0.9)], ["right"]),
        ([(3, HERE)], [(7, NEAR, 0.9)], ["wrong_class"]),
        ([(3, HERE)], [(3, FAR, 0.9)], ["badly_placed"]),
        ([(3, HERE)], [(7, FAR, 0.9)], ["false"]),
        ([(3, HERE)], [(3, THERE, 0.9)], ["false"]),
        ([], [(3, THERE, 0.9)], ["false"]),
        ([(3, HERE)], [(3, HERE, 0.9), (3, NEAR, 0.8)], ["right", "duplicate"]),
        ([(3, HERE)], [(7, HERE, 0.9), (3, NEAR, 0.8)], ["second_class", "right"]),  # it is found, if by another
        ([(3, HERE)], [(7, HERE, 0.9), (9, NEAR, 0.8)], ["wrong_class", "second_class"]),  # taken once
        ([(3, HERE), (7, NEAR)], [(9, HERE, 0.9), (9, HERE, 0.8)], ["wrong_class"] * 2),  # there are two objects
        # Of two equal overlaps the later object is taken, as in pycocotools, and the other is too far for the next
        ([(3, HERE), (3, OTHER)], [(3, BETWEEN, 0.9), (3, OTHER, 0.8)], ["right", "duplicate"]),
        ([(3, OTHER), (3, HERE)], [(3, BETWEEN, 0.9), (3, OTHER, 0.8)], ["right", "right"]),
        ([(3, HERE), (3, THERE, 1)], [(3, [55, 45, 5, 5], 0.9), (7, [55, 45, 5, 5], 0.8)], ["ignored", "false"]),
        ([(3, THERE, 1)], [(7, THERE, 0.8)], ["false"]),  # a crowd is no object
        # Below the threshold of 0.5, as if it were lower
        ([(3, HERE)], [(3, HERE, 0.4), (3, NEAR, 0.3)], ["right", "duplicate"]),
        ([(3, HERE)], [(3, HERE, 0.4), (7, NEAR, 0.3)], ["right", "second_class"]),
        ([(3, HERE)], [(7, HERE, 0.4), (3, NEAR, 0.3)], ["wrong_class", "right"]),
        ([(3, HERE)], [(7, HERE, 0.6), (3, NEAR, 0.3)], ["wrong_class", "right"]),
        ([(3, HERE)], [(3, HERE, 0.6), (7, HERE, 0.3)], ["right", "second_class"]),
    ],
)
def test_kind_of_a_detection(truth: list, detections: list, kinds: list, tmp_path: Path) -> None:
    objects, found = read(image_with(truth, detections), tmp_path)
    pairs = overlapping(objects, found)
    judgement = judge(objects, found, pairs, match(objects, found, pairs), threshold=0.5)
    assert [KINDS[kind] for kind in judgement.kind] == kinds
    assert judgement.sure.tolist() == [score > 0.5 for _, _, score in detections]


def test_slices_count_each_object_once_a_group(tmp_path: Path) -> None:
    made = image_with(
        [(3, [0, 25, 30, 5]), (3, [30, 20, 5, 50]), (7, HERE), (7, NEAR), (3, [60, 3, 20, 20]), (3, THERE, 1)], []
    )
    truth, _ = read(made, tmp_path)
    found = np.array([True, False, True, False, True, False])
    rows = slices(truth, found, neighbours(truth), [12.0, None, None], None)
    counts = {group: [(row["objects"], row["found"]) for row in bins] for group, bins in rows.items()}
    assert counts == {
        "size": [(5, 3), (0, 0), (0, 0)],
        "aspect ratio": [(1, 0), (0, 0), (3, 2), (0, 0), (1, 1)],
        "crowding": [(2, 1), (1, 1), (2, 1)],
        "border": [(1, 1), (4, 2), (0, 0)],
    }
    assert [row["AP"] for row in rows["size"]] == [12.0, None, None]
    assert rows["aspect ratio"][2]["recall"] == pytest.approx(200 / 3)
    assert rows["size"][1]["recall"] is None


def test_detections_beyond_the_limit_do_not_count(tmp_path: Path) -> None:
    made = perfect()
    made.detections = [made.detections[0] | {"score": 0.5 + number / 100} for number in range(20)]
    _, found = read(made, tmp_path, max_dets=12)
    assert found.score.tolist() == pytest.approx([0.69 - number / 100 for number in range(12)])
    assert found.given == 20
