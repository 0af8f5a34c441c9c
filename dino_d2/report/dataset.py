"""Annotations and detections as arrays."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dino_d2.data import CocoFiles, read_coco
from dino_d2.data.annotations import can_be_evaluated, completed


@dataclass(frozen=True)
class Truth:
    """The annotations of a dataset. Objects and crowds are sorted by image.

    ids, names, sizes: of the n images in the order of their ids: id, file name, and (n, 2) int64 width and height.
    classes: names, in the order of the categories' ids.
    category_ids: of the classes.
    image: (m,) int32, index of an object's image.
    label: (m,) int32, index of its class.
    xywh: (m, 4) float64 x, y, width, height in pixels.
    area: (m,) float64 in square pixels, of the mask if the file says so.
    crowd: (m,) bool, whether it stands for several objects.
    notes: sentences on what is odd in the file.
    """

    ids: list[Hashable]
    names: list[str]
    sizes: np.ndarray
    classes: list[str]
    category_ids: list[Hashable]
    image: np.ndarray
    label: np.ndarray
    xywh: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    notes: list[str]

    @property
    def xyxy(self) -> np.ndarray:
        return corners(self.xywh)


@dataclass(frozen=True)
class Found:
    """Detections that count, sorted by image, then by descending score.

    image, label: (k,) int32, indices of image and class.
    xywh: (k, 4) float64 x, y, width, height in pixels.
    score: (k,) float64 in [0, 1].
    given: number of detections before those beyond the limit were dropped.
    """

    image: np.ndarray
    label: np.ndarray
    xywh: np.ndarray
    score: np.ndarray
    given: int

    def __len__(self) -> int:
        return len(self.score)

    @property
    def xyxy(self) -> np.ndarray:
        return corners(self.xywh)


def corners(xywh: np.ndarray) -> np.ndarray:
    """(n, 4) x, y, width, height -> (n, 4) x1, y1, x2, y2."""
    return np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])


def part_of(of_images: np.ndarray, image: int) -> slice:
    """Where the entries of an image are.

    Args:
        of_images: (n,) sorted images of all entries.
    """
    return slice(*np.searchsorted(of_images, [image, image + 1]))


def read_truth(files: CocoFiles) -> Truth:
    """
    Raises:
        FileNotFoundError, ValueError: see :func:`dino_d2.data.read_coco`; or an entry lacks a field, or a box is not
            finite; the message names the file.
    """
    content = read_coco(files.annotations)
    try:
        return _truth(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{files.annotations}: an entry is not as in COCO's format ({type(error).__name__}: {error}); "
            "dino-d2 check lists what is wrong"
        ) from error


def read_found(detections: Iterable[dict[str, Any]], truth: Truth, max_dets: int) -> Found:
    """
    Args:
        detections: in COCO's results format; read once, so that a file can be streamed
            (:func:`dino_d2.data.stream_results`).
        max_dets: highest-scoring detections of an image and class that count.

    Raises:
        ValueError: a detection is not in that format, of an unknown image or category, or not finite, or its score is
            not in [0, 1].
    """
    images, labels = _places(truth.ids), _places(truth.category_ids)
    image, label, numbers = array("i"), array("i"), array("d")
    for entry in detections:
        try:
            image.append(images.get(entry["image_id"], -1))
            label.append(labels.get(entry["category_id"], -1))
            x, y, width, height = entry["bbox"]
            numbers.extend((x, y, width, height, entry["score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "Detections must be in COCO's results format, with image_id, category_id, bbox and score, as in "
                f"coco_instances_results.json; this is not: {entry} ({type(error).__name__}: {error})"
            ) from error
        for index, key in ((image, "image_id"), (label, "category_id")):
            if index[-1] < 0:
                raise ValueError(
                    f"A detection has the {key} {entry[key]!r}, which the annotations do not have: "
                    "are they of another dataset?"
                )
    return _found(np.asarray(image), np.asarray(label), np.asarray(numbers).reshape(-1, 5), truth, max_dets)


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """(n,) integers -> (n,) int32, how many earlier entries are equal."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    rank = np.empty(len(group), np.int32)
    rank[order] = np.arange(len(group)) - np.repeat(begins, np.diff(begins, append=len(group)))
    return rank


def _truth(content: dict[str, list[dict[str, Any]]]) -> Truth:
    images = {entry["id"]: entry for entry in content["images"]}
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    ids, category_ids = sorted(images), sorted(names)
    given = content["annotations"]
    places = _indices((x["image_id"] for x in given), ids)
    labels = _indices((x["category_id"] for x in given), category_ids)
    chosen = np.flatnonzero((places >= 0) & (labels >= 0))
    chosen = chosen[np.argsort(places[chosen], kind="stable")]
    kept = [completed(given[index]) for index in chosen]
    xywh = _boxes(kept)
    if not np.isfinite(xywh).all():
        raise ValueError("a box is infinite or NaN")
    sizes = np.array([[images[x]["width"], images[x]["height"]] for x in ids], np.int64).reshape(-1, 2)
    return Truth(
        ids=ids,
        names=[str(images[x]["file_name"]) for x in ids],
        sizes=sizes,
        classes=[str(names[x]) for x in category_ids],
        category_ids=category_ids,
        image=places[chosen],
        label=labels[chosen],
        xywh=xywh,
        area=np.array([x["area"] for x in kept], np.float64),
        crowd=np.array([x["iscrowd"] for x in kept], bool),
        notes=_notes(given, len(kept)),
    )


def _notes(given: Sequence[dict[str, Any]], kept: int) -> list[str]:
    notes = []
    if kept < len(given):
        notes.append(f"{len(given) - kept} annotations of unknown images or categories do not count.")
    if not all(map(can_be_evaluated, given)):
        notes.append("Some annotations have no area or iscrowd; the area of the box is used, and they are no crowds.")
    ids = [x.get("id") for x in given]
    if 0 in ids or None in ids or len(set(ids)) < len(ids):
        notes.append(
            "Annotations have the id 0, an id twice or none. pycocotools never counts such objects as found, and may "
            "give a lower AP than this report."
        )
    return notes


def _indices(ids: Iterable[Hashable], known: Sequence[Hashable]) -> np.ndarray:
    """Index of each id in `known`; -1 for unknown ones."""
    places = _places(known)
    return np.fromiter((places.get(number, -1) for number in ids), np.int32)


def _places(known: Sequence[Hashable]) -> dict[Hashable, int]:
    return {number: index for index, number in enumerate(known)}


def _boxes(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    if any(len(x["bbox"]) != 4 for x in entries):
        raise ValueError("a bbox must have four numbers: x, y, width, height")
    return np.fromiter(chain.from_iterable(x["bbox"] for x in entries), np.float64, 4 * len(entries)).reshape(-1, 4)


def _found(image: np.ndarray, label: np.ndarray, numbers: np.ndarray, truth: Truth, max_dets: int) -> Found:
    """Check, sort, and drop what is beyond the limit. numbers: (n, 5) x, y, width, height, score."""
    score = numbers[:, 4]
    if not np.isfinite(numbers).all():
        raise ValueError("The box or score of a detection is infinite or NaN; remove such detections")
    if len(score) and not (score.min() >= 0 and score.max() <= 1):
        raise ValueError(f"Scores of detections must be in [0, 1], but are from {score.min():g} to {score.max():g}")
    order = np.lexsort((-score, image))
    order = order[rank_in_group(image[order].astype(np.int64) * len(truth.classes) + label[order]) < max_dets]
    return Found(image[order], label[order], numbers[order, :4], score[order], len(score))
