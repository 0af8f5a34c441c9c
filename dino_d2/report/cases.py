"""Missed objects and wrong detections, the clearest first, and a choice of images with some of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .dataset import Found, Truth, rank_in_group
from .errors import Judgement

CASES = ("missed", "false", "wrong_class", "badly_placed", "duplicate", "second_class", "sure_but_wrong")


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
