"""The images that a report shows, with their boxes, and where to look in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cases import CASES, choose_images, rank_cases
from .dataset import Truth, corners, part_of
from .errors import KINDS
from .label_errors import LabelError, sure_score
from .model import Model

FAINTEST = 0.05  # score of the detections that are drawn, unless the threshold is lower
DRAWN = 100  # detections of an image


def lowest_drawn(*thresholds: float) -> float:
    """Score from which on detections are drawn.

    Args:
        thresholds: of every model that the page shows.
    """
    return min(FAINTEST, *thresholds)


def choose_gallery(model: Model, errors: Sequence[LabelError], number: int) -> list[int]:
    """Indices of images, worst first; they take turns to be the worst, and the clearest of each kind of case."""
    worst = np.lexsort((-model.counts.wrong - model.counts.missed, model.counts.f1))
    ranked = _images_of_cases(model)
    chosen = set(choose_images([worst, np.array([x.image for x in errors], np.int64), *ranked.values()], number))
    return [image for image in worst.tolist() if image in chosen]


def show(model: Model, gallery: Sequence[int], errors: Sequence[LabelError]) -> dict[str, Any]:
    """The report's "images", "cases" and "label_errors"."""
    place = {image: number for number, image in enumerate(gallery)}
    lowest = lowest_drawn(model.judgement.threshold)
    images = [
        image_entry(model.truth, image)
        | {
            "F1": float(model.counts.f1[image]),
            "truth": truth_of_image(model, image),
            "found": found_of_image(model, image, lowest),
        }
        for image in gallery
    ]
    cases: dict[str, list] = {}
    for case, items in _ranked(model).items():
        of_images, limit = (model.truth.image, None) if case == "missed" else (model.found.image, DRAWN)
        cases[case] = _places(place, of_images, items, limit)
    cases["worst_images"] = [number for number, image in enumerate(gallery) if model.counts.f1[image] < 100]
    return {"images": images, "cases": cases, "label_errors": [_entry(x, place) for x in errors if x.image in place]}


def image_entry(truth: Truth, image: int) -> dict[str, Any]:
    """What does not depend on the model. "objects" counts no crowds."""
    width, height = truth.sizes[image].tolist()
    entry = {"id": truth.ids[image], "file": truth.names[image], "width": width, "height": height}
    return entry | {"objects": int((~truth.crowd[part_of(truth.image, image)]).sum())}


def truth_of_image(model: Model, image: int) -> list[list]:
    """[x1, y1, x2, y2, class, found, crowd] of each object."""
    truth, part = model.truth, part_of(model.truth.image, image)
    rows = zip(truth.label[part], model.judgement.found[part], truth.crowd[part], strict=True)
    return [[*box, *map(int, row)] for box, row in zip(_rounded(truth.xywh[part]), rows, strict=True)]


def found_of_image(model: Model, image: int, lowest: float) -> list[list]:
    """[x1, y1, x2, y2, class, score, kind] of each detection that scores at least `lowest`, surest first."""
    found, judgement = model.found, model.judgement
    part = part_of(found.image, image)
    number = int((found.score[part] >= lowest).sum())
    part = slice(part.start, part.start + min(number, DRAWN))
    rows = zip(found.label[part], found.score[part], judgement.kind[part], strict=True)
    return [
        [*box, int(label), round(float(score), 4), KINDS[kind]]
        for box, (label, score, kind) in zip(_rounded(found.xywh[part]), rows, strict=True)
    ]


def left_out_of_pictures(lowest: float) -> str:
    return f"Pictures show detections that score at least {lowest:.3g}, at most {DRAWN} of an image."


def left_out_of_gallery(model: Model, gallery: Sequence[int]) -> list[str]:
    sentences = [left_out_of_pictures(lowest_drawn(model.judgement.threshold))]
    images = len(model.truth.ids)
    if len(gallery) < images:
        sentences.append(f"{len(gallery)} of {images} images are shown.")
    return sentences


def left_out_of_errors(errors: Sequence[LabelError], gallery: Sequence[int]) -> list[str]:
    shown = sum(x.image in set(gallery) for x in errors)
    if shown == len(errors):
        return []
    return [f"{shown} of {len(errors)} likely label errors are shown: those in images that are shown."]


def _ranked(model: Model) -> dict[str, np.ndarray]:
    return rank_cases(model.truth, model.found, model.judgement, sure_score(model.found, model.judgement))


def _images_of_cases(model: Model) -> dict[str, np.ndarray]:
    images = {case: model.truth.image if case == "missed" else model.found.image for case in CASES}
    return {case: images[case][items] for case, items in _ranked(model).items()}


def _places(place: dict[int, int], of_images: np.ndarray, items: np.ndarray, limit: int | None) -> list[list[int]]:
    """[place of the image in the gallery, place of the item in the image] of the items that are shown.

    Args:
        of_images: (n,) sorted images of all objects or detections.
        items: indices into them.
        limit: number of items of an image that are shown; None: all.
    """
    inside = items - np.searchsorted(of_images, of_images[items])
    return [
        [place[image], number]
        for image, number in zip(of_images[items].tolist(), inside.tolist(), strict=True)
        if image in place and (limit is None or number < limit)
    ]


def _entry(error: LabelError, place: dict[int, int]) -> dict[str, Any]:
    return {
        "image": place[error.image],
        "box": np.round(error.box, 1).tolist(),
        "class": error.label,
        "score": error.score,
        "kind": error.kind,
        "reason": error.reason,
    }


def _rounded(xywh: np.ndarray) -> list[list[float]]:
    return np.round(corners(xywh), 1).tolist()
