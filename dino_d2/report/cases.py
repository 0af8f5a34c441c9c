"""Which images are shown, and where to look in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .dataset import Found, Truth, corners, rank_in_group
from .errors import KINDS, Judgement

FAINTEST = 0.05  # score of the detections that are drawn
DRAWN = 100  # detections of an image
CASES = ("missed", "false", "wrong_class", "badly_placed", "duplicate", "sure_but_wrong")


def rank_cases(truth: Truth, found: Found, judgement: Judgement, sure_score: float) -> dict[str, np.ndarray]:
    """Indices of the objects that are missed, largest first, and of the detections of each other case, surest first.

    Of wrong classes, each pair of classes comes once before any comes twice, frequent ones first.

    Args:
        sure_score: from which on a false detection is "sure but wrong".
    """
    missed = np.flatnonzero(~judgement.found & ~truth.crowd)
    ranked = {"missed": missed[np.argsort(-truth.area[missed], kind="stable")]}
    for case in CASES[1:]:
        which = judgement.sure & judgement.is_kind("false" if case == "sure_but_wrong" else case)
        if case == "sure_but_wrong":
            which &= found.score >= sure_score
        chosen = np.flatnonzero(which)
        ranked[case] = chosen[np.argsort(-found.score[chosen], kind="stable")]
    wrong = ranked["wrong_class"]
    pair = truth.label[judgement.object[wrong]].astype(np.int64) * len(truth.classes) + found.label[wrong]
    _, pair, counts = np.unique(pair, return_inverse=True, return_counts=True)
    pair = pair.ravel()
    ranked["wrong_class"] = wrong[np.lexsort((-counts[pair], rank_in_group(pair)))]
    return ranked


def choose_images(rankings: Sequence[np.ndarray], number: int) -> list[int]:
    """Indices of images, taken in turn from the beginning of each ranking; at most `number`."""
    rankings = [list(dict.fromkeys(ranking.tolist())) for ranking in rankings]
    chosen: dict[int, None] = {}
    for place in range(max(map(len, rankings), default=0)):
        for ranking in rankings:
            if place < len(ranking) and len(chosen) < number:
                chosen.setdefault(ranking[place])
        if len(chosen) == number:
            break
    return list(chosen)


def truth_of_image(truth: Truth, judgement: Judgement, image: int) -> list[list]:
    """[x1, y1, x2, y2, class, found, crowd] of each object."""
    part = _part(truth.image, image)
    rows = zip(truth.label[part], judgement.found[part], truth.crowd[part], strict=True)
    return [[*box, *map(int, row)] for box, row in zip(_rounded(truth.xywh[part]), rows, strict=True)]


def found_of_image(found: Found, judgement: Judgement, image: int) -> list[list]:
    """[x1, y1, x2, y2, class, score, kind] of each detection that is drawn, surest first."""
    part = _part(found.image, image)
    number = int((found.score[part] >= min(FAINTEST, judgement.threshold)).sum())
    part = slice(part.start, part.start + min(number, DRAWN))
    rows = zip(found.label[part], found.score[part], judgement.kind[part], strict=True)
    return [
        [*box, int(label), round(float(score), 4), KINDS[kind]]
        for box, (label, score, kind) in zip(_rounded(found.xywh[part]), rows, strict=True)
    ]


def image_entry(truth: Truth, image: int) -> dict[str, Any]:
    """What the models have in common; objects are counted without crowds."""
    part = _part(truth.image, image)
    width, height = truth.sizes[image].tolist()
    entry = {"id": truth.ids[image], "file": truth.names[image], "width": width, "height": height}
    return entry | {"objects": int((~truth.crowd[part]).sum())}


def places_in(gallery: Sequence[int], of_images: np.ndarray, items: np.ndarray, limit: int | None) -> list[list[int]]:
    """[place of the image in the gallery, place of the item in the image] of the items that are shown.

    Args:
        of_images: (n,) sorted images of all objects or detections.
        items: indices into them.
        limit: number of items of an image that are shown; None: all.
    """
    place = {image: number for number, image in enumerate(gallery)}
    inside = items - np.searchsorted(of_images, of_images[items])
    return [
        [place[image], number]
        for image, number in zip(of_images[items].tolist(), inside.tolist(), strict=True)
        if image in place and (limit is None or number < limit)
    ]


def _part(of_images: np.ndarray, image: int) -> slice:
    return slice(*np.searchsorted(of_images, [image, image + 1]))


def _rounded(xywh: np.ndarray) -> list[list[float]]:
    return np.round(corners(xywh), 1).tolist()
