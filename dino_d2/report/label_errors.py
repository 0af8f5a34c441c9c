"""Annotations that are probably wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .dataset import Found, Truth, corners
from .errors import Judgement
from .matches import Pairs, iou_of

SAME_PLACE = 0.7  # IoU of a detection and an object that it gives another class
DRAWN_BADLY = 0.3  # IoU of a detection and the object that its box corrects
TWICE = 0.8  # IoU of two annotations of one object
MOST = 1000  # errors to report


@dataclass(frozen=True)
class LabelError:
    """image: index. box: (4,) x1, y1, x2, y2 in pixels. label: the class of the detection or annotation.

    score: of the detection; of an object annotated twice the IoU of its annotations.
    kind: "missing label", "wrong class", "badly drawn box" or "annotated twice".
    """

    image: int
    box: np.ndarray
    label: int
    score: float
    kind: str
    reason: str


def sure_score(found: Found, judgement: Judgement) -> float:
    """The score that the better half of the right detections has; infinite if none is right."""
    right = judgement.sure & judgement.is_kind("right")
    return float(np.median(found.score[right])) if right.any() else np.inf


def label_errors(truth: Truth, found: Found, judgement: Judgement, near: Pairs) -> list[LabelError]:
    """Where the detector is as sure as with the better half of its right detections, and disagrees with the annotation;
    and objects annotated twice. The surest first, at most `MOST`.

    Args:
        near: pairs of objects that overlap; see :func:`dino_d2.report.slices.neighbours`.
    """
    sure = judgement.sure & (found.score >= sure_score(found, judgement))
    place = judgement.object
    overlap = np.zeros(len(found))
    on_object = np.flatnonzero(sure & (place >= 0))
    overlap[on_object] = iou_of(found.xywh[on_object], truth.xywh[place[on_object]], truth.crowd[place[on_object]])
    missed = np.append(~judgement.found, False)[place]
    masks = {
        "missing label": judgement.is_kind("false"),
        "wrong class": judgement.is_kind("wrong_class") & (overlap >= SAME_PLACE),
        "badly drawn box": judgement.is_kind("badly_placed") & (overlap >= DRAWN_BADLY) & missed,
    }
    errors = _annotated_twice(truth, near)
    for kind, mask in masks.items():
        chosen = np.flatnonzero(sure & mask)
        for index in chosen[np.argsort(-found.score[chosen], kind="stable")][:MOST]:
            name = truth.classes[found.label[index]]
            if kind == "missing label":
                reason = f"The detector sees {name}, and nothing is annotated there."
            elif kind == "wrong class":
                reason = f"Annotated as {truth.classes[truth.label[place[index]]]}, but the detector sees {name}."
            else:
                reason = f"The detector sees {name} in a box whose IoU with the annotated one is {overlap[index]:.2f}."
            (box,) = corners(found.xywh[index : index + 1])
            label, score = int(found.label[index]), float(found.score[index])
            errors.append(LabelError(int(found.image[index]), box, label, score, kind, reason))
    return sorted(errors, key=lambda error: -error.score)[:MOST]


def _annotated_twice(truth: Truth, near: Pairs) -> list[LabelError]:
    twice = near[(near.found < near.object) & (near.iou >= TWICE)]
    twice = twice[truth.label[twice.found] == truth.label[twice.object]]
    return [
        LabelError(
            int(truth.image[index]),
            corners(truth.xywh[index : index + 1])[0],
            int(truth.label[index]),
            float(iou),
            "annotated twice",
            f"Two boxes of {truth.classes[truth.label[index]]} are in the same place; their IoU is {iou:.2f}.",
        )
        for index, iou in zip(twice.object, twice.iou, strict=True)
    ]
