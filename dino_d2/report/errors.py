"""What is wrong with each detection, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .dataset import Found, Truth
from .matches import IGNORED, IOU, RIGHT, WRONG, Matches, Pairs, take_in_turn

KINDS = ("right", "wrong_class", "badly_placed", "duplicate", "second_class", "false", "ignored")
BACKGROUND = -1
LISTED = 20  # images of a cell of the confusion matrix


@dataclass(frozen=True)
class Judgement:
    """What each of k detections is, and which of m objects are found.

    threshold: score that a detection must exceed to count.
    sure: (k,) bool, whether its score does.
    kind: (k,) int8, index in `KINDS`. If it is not sure: what it would be if the threshold were just below its score.
    object: (k,) int32, index of the object that the kind is about; -1: none.
    found: (m,) bool, objects with a sure detection that is right. Crowds never are.
    """

    threshold: float
    sure: np.ndarray
    kind: np.ndarray
    object: np.ndarray
    found: np.ndarray

    def is_kind(self, kind: str) -> np.ndarray:
        """(k,) bool."""
        return self.kind == KINDS.index(kind)


def judge(truth: Truth, found: Found, pairs: Pairs, matches: Matches, threshold: float) -> Judgement:
    """Say what each detection is.

    "right": matched to an object as COCO does, at IoU 0.5. "ignored": in a crowd of its class. Else the first of:
    "wrong_class": IoU of 0.5 with an object of another class that nobody found. Each object is so taken once.
    "duplicate": IoU of 0.5 with an object of its class, which is then found by another.
    "second_class": IoU of 0.5 with an object of another class, which is then found or taken by another.
    "badly_placed": IoU of 0.1 with an object of its class.
    "false": nothing of these.
    """
    status, sure = matches.status[0, 0], found.score > threshold
    kind = np.full(len(found), KINDS.index("false"), np.int8)
    objects = np.full(len(found), -1, np.int32)

    pairs = pairs[(status[pairs.found] == WRONG) & ~truth.crowd[pairs.object]]
    pairs = pairs[np.lexsort((-pairs.iou, pairs.found))]
    same = found.label[pairs.found] == truth.label[pairs.object]
    on_it = pairs.iou >= IOU
    # Each kind overwrites those before it.
    for name, which in (
        ("badly_placed", same & ~on_it),
        ("second_class", ~same & on_it),
        ("duplicate", same & on_it),
    ):
        _set(kind, objects, name, pairs[which])
    left = pairs[on_it & ~same & ~_is_found(truth, found, pairs, matches, sure)]
    taken = take_in_turn(left, found.image, np.zeros(len(truth.image), bool))
    wrong = np.flatnonzero(taken >= 0)
    kind[wrong], objects[wrong] = KINDS.index("wrong_class"), taken[wrong]

    for name, value in (("right", RIGHT), ("ignored", IGNORED)):
        which = status == value
        kind[which], objects[which] = KINDS.index(name), matches.matched[which]
    is_found = np.zeros(len(truth.image), bool)
    is_found[matches.matched[(status == RIGHT) & sure]] = True
    return Judgement(threshold, sure, kind, objects, is_found)


def _set(kind: np.ndarray, objects: np.ndarray, name: str, pairs: Pairs) -> None:
    """Set the kind of the detections in `pairs`, and the first object of each."""
    first = np.diff(pairs.found, prepend=-1) != 0
    kind[pairs.found[first]] = KINDS.index(name)
    objects[pairs.found[first]] = pairs.object[first]


def _is_found(truth: Truth, found: Found, pairs: Pairs, matches: Matches, sure: np.ndarray) -> np.ndarray:
    """Whether the object of each pair is found by a detection that is sure or scores more than the pair's."""
    by = np.full(len(truth.image), len(found), np.int64)
    right = np.flatnonzero(matches.status[0, 0] == RIGHT)
    by[matches.matched[right]] = right
    by_sure = np.append(sure, False)[by]
    return by_sure[pairs.object] | (by[pairs.object] < pairs.found)


def confusion(truth: Truth, found: Found, judgement: Judgement, first: Sequence[int]) -> list[list]:
    """Cells [true class, found class, count, ids of images], of the sure detections; `BACKGROUND` for no class.

    Args:
        first: indices of images whose ids come first.
    """
    matched = judgement.sure & (judgement.is_kind("right") | judgement.is_kind("wrong_class"))
    alone = judgement.sure & ~matched & ~judgement.is_kind("ignored")
    missed = ~truth.crowd
    missed[judgement.object[matched]] = False
    true_class = [truth.label[judgement.object[matched]], np.full(alone.sum(), BACKGROUND), truth.label[missed]]
    found_class = [found.label[matched], found.label[alone], np.full(missed.sum(), BACKGROUND)]
    image = np.concatenate([found.image[matched], found.image[alone], truth.image[missed]])
    both = np.stack([np.concatenate(true_class), np.concatenate(found_class)], axis=1)
    cells, cell, counts = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    images = np.split(image[np.argsort(cell.ravel(), kind="stable")], np.cumsum(counts)[:-1])
    rows = []
    for pair, count, part in zip(cells, counts, images, strict=False):
        part = np.unique(part)
        part = part[np.argsort(~np.isin(part, first), kind="stable")][:LISTED]
        rows.append([*map(int, pair), int(count), [truth.ids[x] for x in part]])
    return rows
