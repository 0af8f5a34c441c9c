"""COCO's matching of detections to objects, for all images at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .dataset import Found, Truth, rank_in_group

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU, as in COCO
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # square pixels
IOU = 0.5  # to find an object
FAINT = 0.1  # IoU below which a detection has nothing to do with an object, as in TIDE
RIGHT, WRONG, IGNORED = 1, 0, -1
AT_ONCE = 2**20  # pairs whose IoU is computed at a time


@dataclass(frozen=True)
class Pairs:
    """Overlapping detections and objects of the same image, of any classes, sorted by detection, then by object.

    found, object: (p,) int32, indices. iou: (p,) float64, at least `FAINT`; with a crowd, the detection's share inside.
    """

    found: np.ndarray
    object: np.ndarray
    iou: np.ndarray

    def __getitem__(self, which: np.ndarray) -> Pairs:
        return Pairs(self.found[which], self.object[which], self.iou[which])


@dataclass(frozen=True)
class Matches:
    """COCO's matching of k detections to m objects.

    status: (areas, thresholds, k) int8 `RIGHT`, `WRONG` or `IGNORED`.
    counted: (areas, m) bool, objects to be found: of that area, no crowds.
    matched: (k,) int32, index of the object or crowd at IoU 0.5 in all areas; -1: none.
    """

    status: np.ndarray
    counted: np.ndarray
    matched: np.ndarray


def overlapping(truth: Truth, found: Found) -> Pairs:
    """All pairs of a detection and an object of its image that overlap."""
    begins = np.searchsorted(truth.image, np.arange(len(truth.ids) + 1))
    counts = np.diff(begins)[found.image]
    parts = [Pairs(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))]
    for part in _parts(counts):
        number = counts[part]
        left = np.repeat(np.arange(part.start, part.stop, dtype=np.int32), number)
        skipped = np.repeat(begins[found.image[part]] - (np.cumsum(number) - number), number)
        right = (np.arange(len(left)) + skipped).astype(np.int32)
        iou = iou_of(found.xywh[left], truth.xywh[right], truth.crowd[right])
        near = np.flatnonzero(iou >= FAINT)
        parts.append(Pairs(left[near], right[near], iou[near]))
    return Pairs(*(np.concatenate([getattr(x, name) for x in parts]) for name in ("found", "object", "iou")))


def match(truth: Truth, found: Found, pairs: Pairs, areas: tuple[str, ...] = tuple(AREAS)) -> Matches:
    """Match as pycocotools does: each detection, highest score first, takes the best free object of its class.

    Args:
        areas: names from `AREAS`, "all" first.
    """
    pairs = pairs[(pairs.iou >= IOU) & (found.label[pairs.found] == truth.label[pairs.object])]
    status = np.zeros((len(areas), len(THRESHOLDS), len(found)), np.int8)
    counted = np.zeros((len(areas), len(truth.image)), bool)
    sizes = found.xywh[:, 2] * found.xywh[:, 3]
    matched = np.full(len(found), -1, np.int32)
    groups = found.image.astype(np.int64) * len(truth.classes) + found.label
    for number, (low, high) in enumerate(AREAS[name] for name in areas):
        ignored = truth.crowd | (truth.area < low) | (truth.area > high)
        counted[number] = ~ignored
        outside = (sizes < low) | (sizes > high)
        ordered = pairs[np.lexsort((-pairs.object, -pairs.iou, ignored[pairs.object], pairs.found))]
        for place, threshold in enumerate(THRESHOLDS):
            objects = take_in_turn(ordered[ordered.iou >= threshold], groups, truth.crowd)
            status[number, place] = np.where(objects < 0, -outside.astype(np.int8), RIGHT)
            status[number, place, np.append(ignored, False)[objects]] = IGNORED  # -1 is the appended one
            if number == place == 0:
                matched = objects
    return Matches(status, counted, matched)


def take_in_turn(pairs: Pairs, groups: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Let detections take objects, one of each group in turn: the first free object of their pairs.

    Args:
        pairs: sorted by detection, then by preference.
        groups: (k,) integers, of each detection; no object is in pairs with several groups.
        shared: (m,) bool, objects that any number may take.

    Returns:
        (k,) int32, index of the object; -1: none.
    """
    taken = np.full(len(groups), -1, np.int32)
    if not len(pairs.found):
        return taken
    new = np.diff(pairs.found, prepend=-1) != 0
    turn = rank_in_group(groups[pairs.found[new]])[np.cumsum(new) - 1]
    pairs = pairs[np.argsort(turn, kind="stable")]
    ends = np.cumsum(np.bincount(turn))
    free = np.ones(len(shared), bool)
    for begin, end in zip((0, *ends), ends, strict=False):
        left = begin + np.flatnonzero(free[pairs.object[begin:end]])
        left = left[np.diff(pairs.found[left], prepend=-1) != 0]
        objects = pairs.object[left]
        taken[pairs.found[left]] = objects
        free[objects] = shared[objects]
    return taken


def _parts(counts: np.ndarray) -> Iterator[slice]:
    """Slices of the detections with about `AT_ONCE` pairs each."""
    total = np.cumsum(counts)
    ends = np.searchsorted(total, np.arange(AT_ONCE, (total[-1] if len(total) else 0) + AT_ONCE, AT_ONCE))
    begin = 0
    for end in np.minimum(ends + 1, len(counts)):
        if end > begin:
            yield slice(begin, int(end))
        begin = int(end)


def iou_of(found: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """In the order of pycocotools' operations, so that no rounding differs. Boxes (p, 4) x, y, width, height."""
    sides = np.minimum(found[:, :2] + found[:, 2:], objects[:, :2] + objects[:, 2:])
    sides -= np.maximum(found[:, :2], objects[:, :2])
    inside = np.where((sides > 0).all(1), sides[:, 0] * sides[:, 1], 0.0)
    size = found[:, 2] * found[:, 3]
    union = np.where(crowd, size, size + objects[:, 2] * objects[:, 3] - inside)
    return np.divide(inside, union, out=np.zeros_like(inside), where=inside > 0)
