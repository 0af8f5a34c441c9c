"""AP by class, and which photographs are the best and the worst."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_d2 import load_config
from dino_d2.data import CocoFiles
from dino_d2.report.own_dataset import ap_table, best_and_worst, draw, report_on_own_dataset, score_images

NAMES = ["cat", "dog"]
HERE, THERE = [10, 10, 20, 20], [50, 40, 30, 30]  # x, y, width, height
NEAR = [12, 10, 20, 20]  # IoU with HERE: 18 / 22
FAR = [18, 10, 20, 20]  # 12 / 28


def dataset(folder: Path, truth: list[list[tuple]]) -> CocoFiles:
    """A image for each list of (category id, box) or (category id, box, 1 for a crowd)."""
    images, annotations = [], []
    for number, objects in enumerate(truth, start=1):
        name = f"{number}.png"
        Image.fromarray(np.full((80, 100, 3), 90, np.uint8)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": 100, "height": 80})
        for category, box, *crowd in objects:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": int(bool(crowd))})
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    file = folder / "val.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return CocoFiles(file, folder)


def found(image: int, category: int, box: list, score: float = 0.9) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.mark.parametrize(
    ("truth", "detections", "right", "f1"),
    [
        ([(3, HERE)], [found(1, 3, NEAR)], 1, 1.0),
        ([(3, HERE)], [found(1, 3, FAR)], 0, 0.0),
        ([(3, HERE)], [found(1, 7, HERE)], 0, 0.0),  # another class
        ([(3, HERE)], [found(1, 3, HERE, score=0.3)], 0, 0.0),  # not sure enough
        ([(3, HERE)], [found(1, 3, HERE), found(1, 3, NEAR)], 1, 2 / 3),  # one object is found once
        ([(3, HERE), (7, THERE)], [found(1, 3, HERE)], 1, 2 / 3),
        ([(3, HERE), (3, NEAR)], [found(1, 3, NEAR, 0.5), found(1, 3, HERE, 0.8)], 2, 1.0),
        ([(3, HERE), (3, THERE, 1)], [found(1, 3, HERE), found(1, 3, [55, 45, 5, 5])], 1, 1.0),  # in a crowd
        ([(3, HERE), (7, THERE, 1)], [found(1, 3, HERE), found(1, 3, [55, 45, 5, 5])], 1, 2 / 3),  # of another class
        ([], [], 0, 1.0),
        ([], [found(1, 3, HERE)], 0, 0.0),
    ],
)
def test_f1_of_a_photograph(tmp_path: Path, truth: list, detections: list, right: int, f1: float) -> None:
    (photograph,) = score_images(dataset(tmp_path, [truth]), detections)
    assert (photograph.right, photograph.f1) == (right, pytest.approx(f1))


def test_threshold_decides_what_was_found(tmp_path: Path) -> None:
    files, detections = dataset(tmp_path, [[(3, HERE)]]), [found(1, 3, HERE, 0.2), found(1, 3, THERE, 0.1)]
    counts = [len(score_images(files, detections, threshold)[0].found) for threshold in (0.05, 0.1, 0.15, 0.3)]
    assert counts == [2, 1, 1, 0]


def test_detections_beyond_the_limit_of_the_evaluation_do_not_count(tmp_path: Path) -> None:
    files = dataset(tmp_path, [[(3, HERE)]])
    detections = [found(1, 3, HERE, 0.9), found(1, 3, THERE, 0.8), found(1, 7, THERE, 0.7)]
    counts = [len(score_images(files, detections, max_dets=limit)[0].found) for limit in (1, 2)]
    assert counts == [2, 3]  # of each class


def test_best_and_worst_are_ordered_and_none_is_both(tmp_path: Path) -> None:
    truth = [[(3, HERE)], [(3, HERE), (7, THERE)], [], [(3, HERE), (7, THERE)], [(3, HERE)], [(3, HERE)], [(3, HERE)]]
    detections = [found(1, 3, HERE), found(2, 3, HERE), found(2, 7, THERE), found(4, 3, HERE), found(6, 7, THERE)]
    photographs = score_images(dataset(tmp_path, truth), detections)
    best, worst = ([one.path.stem for one in chosen] for chosen in best_and_worst(photographs))
    assert best == ["2", "1", "3"]  # more objects first, none last
    assert worst[0] == "6"  # it has a wrong detection, too
    assert set(worst) == {"5", "6", "7"}
    best, worst = best_and_worst(photographs[:4])
    assert ([one.path.stem for one in best], [one.path.stem for one in worst]) == (["2", "1", "3"], ["4"])


def test_truth_is_drawn_beside_what_was_found(tmp_path: Path) -> None:
    (photograph,) = score_images(dataset(tmp_path, [[(3, HERE)]]), [found(1, 3, THERE)])
    picture = np.asarray(draw(photograph, NAMES)).astype(int)
    left, right = picture[60:, : picture.shape[1] // 2], picture[60:, picture.shape[1] // 2 :]
    coloured = [np.argwhere(np.ptp(half, axis=-1) > 60) / 8 for half in (left, right)]  # 100 pixels are drawn as 800
    assert coloured[0][:, 1].max() < 35 < 50 < coloured[1][:, 1].max()


def report(folder: Path, truth: list[list[tuple]], detections: list[dict]) -> Path:
    """Of a run in that folder; returns its examples."""
    files = dataset(folder, truth)
    cfg = load_config("dino_r50_4scale_12ep", ["OUTPUT_DIR", str(folder), "MODEL.DINO.CLASS_NAMES", NAMES])
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TEST = [["own", str(files.annotations), str(files.images)]], ("own",)
    file = folder / "inference" / "own" / "coco_instances_results.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(detections))
    report_on_own_dataset(cfg, {"bbox": {"AP": 50.0, "AP-cat": 50.0, "AP-dog": float("nan")}})
    return folder / "examples"


def test_boxes_of_negative_sides_are_drawn(tmp_path: Path) -> None:
    examples = report(tmp_path, [[(3, [30, 40, -20, -10])]], [found(1, 3, HERE)])
    assert [path.name for path in examples.iterdir()] == ["best_1.png"]


def test_what_cannot_be_drawn_is_logged_and_the_rest_follows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report(tmp_path, [[(3, HERE)]], [found(1, 3, HERE, score=1.5)])
    assert "of own: Scores of detections must be in [0, 1]" in caplog.text
    assert f"Next: dino-d2 predict --weights {tmp_path}" in caplog.text


def test_table_has_a_row_for_each_class() -> None:
    metrics = {"AP": 30.25, "AP50": 60.0, "AP75": 20.0, "AP-cat": 60.5, "AP-dog": float("nan")}
    lines = ap_table(metrics, NAMES, {0: 4}).splitlines()
    assert [line.split() for line in lines[2:5]] == [["cat", "4", "60.5"], ["dog", "0", "–"], ["all", "4", "30.2"]]
    assert lines[5] == "AP50 60.0, AP75 20.0"
    single = ap_table({"AP": 30.0}, ["cat"], {0: 4}).splitlines()  # detectron2 has no rows of a single class
    assert single[2].split() == ["cat", "4", "30.0"]
