"""The score threshold with the highest F1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import hotcoco
    from pycocotools.cocoeval import COCOeval

IOU = 0.5  # to match an object; the first of COCO's ten thresholds


@dataclass(frozen=True)
class Matches:
    """COCO's matching at IoU 0.5, pooled over images and classes, without detections in crowds.

    scores: (n,) float64, scores of the detections.
    right: (n,) bool, whether a detection is matched to an object.
    objects: number of objects, without crowds.
    """

    scores: np.ndarray
    right: np.ndarray
    objects: int


def best_f1(matches: Matches) -> tuple[float, float]:
    """The highest F1 = 2 TP / (detections + objects) over all score thresholds, and that threshold.

    Detections with a higher score count. The threshold lies halfway between the lowest of them and the next one, or 0.
    If several thresholds give the same F1, it is the lowest.

    Returns:
        F1 in [0, 1], NaN without objects; the threshold in [0, 1], NaN if no detection is right.
    """
    if not matches.objects:
        return float("nan"), float("nan")
    order = np.argsort(-matches.scores, kind="stable")
    order = order[matches.scores[order] > 0]
    scores = np.append(matches.scores[order], 0.0)
    last = np.flatnonzero(scores[:-1] > scores[1:])  # detections with equal scores count together
    right = matches.right[order].cumsum()[last]
    f1 = 2 * right / (last + 1 + matches.objects)
    if not right.any():
        return 0.0, float("nan")
    best = len(f1) - 1 - f1[::-1].argmax()
    return float(f1[best]), float((scores[last[best]] + scores[last[best] + 1]) / 2)


def matches_of_pycocotools(evaluation: COCOeval) -> Matches:
    """The matches of a finished box evaluation with COCO's IoU thresholds and areas."""
    everything = evaluation.params.areaRng[0]
    images = [image for image in evaluation.evalImgs if image is not None and image["aRng"] == everything]
    scores = _joined(image["dtScores"] for image in images)
    matched, ignored = (_joined(image[key][0] for image in images) > 0 for key in ("dtMatches", "dtIgnore"))
    crowds = _joined(image["gtIgnore"] for image in images)
    return Matches(scores[~ignored], matched[~ignored], int(np.count_nonzero(crowds == 0)))


def matches_of_hotcoco(evaluation: hotcoco.COCOeval, scores: np.ndarray) -> Matches:
    """The matches of a finished evaluation.

    Args:
        scores: of all detections, in the order they were given to it.
    """
    # eval_imgs has the same in one dictionary per image, class and area, and is much slower.
    found = evaluation.image_diagnostics(iou_thr=IOU, score_thr=np.inf)
    numbers = np.fromiter(found["dt_status"], np.int64, len(found["dt_status"]))  # counted from 1
    right = np.array([status == "tp" for status in found["dt_status"].values()], bool)
    return Matches(scores[numbers - 1], right, len(found["gt_status"]))


def _joined(parts: Iterable[Sequence[float]]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *parts])
