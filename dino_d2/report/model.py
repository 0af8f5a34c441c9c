"""What one model found on a dataset, matched and judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dino_d2.detections import DEFAULT_THRESHOLD
from dino_d2.evaluation.f1 import Matches as ScoredMatches
from dino_d2.evaluation.f1 import best_f1
from dino_d2.evaluation.settings import FEWEST_DETS

from . import ap
from .dataset import Found, Truth, read_found
from .errors import Judgement, judge
from .intervals import Samples, interval, ratio, resample
from .matches import IGNORED, RIGHT, Matches, match, overlapping


@dataclass(frozen=True)
class NumbersOptions:
    """What to compute.

    max_dets: highest-scoring detections of an image and class that count.
    threshold: score that a detection must exceed for precision, recall, cases and the like; None: the one with the
        best F1.
    resamples: bootstrap samples for the intervals; 0: no intervals.
    gallery: most images that are shown.

    Raises:
        ValueError: a value is out of its range.
    """

    max_dets: int = 100
    threshold: float | None = None
    resamples: int = 1000
    seed: int = 0
    gallery: int = 200

    def __post_init__(self) -> None:
        if self.max_dets < FEWEST_DETS:
            raise ValueError(f"max_dets is {self.max_dets}; a report needs at least {FEWEST_DETS}")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it must be at least 0 and less than 1")
        if min(self.resamples, self.seed, self.gallery) < 0:
            raise ValueError("resamples, seed and gallery must not be negative")


@dataclass(frozen=True)
class Model:
    """precision: AP. tide, calibration: as in the report; None unless asked for. chosen: whether the threshold is the
    one with the best F1."""

    truth: Truth
    found: Found
    matches: Matches
    judgement: Judgement
    chosen: bool
    precision: ap.AveragePrecision
    tide: dict[str, float] | None
    calibration: dict[str, Any] | None

    @cached_property
    def counts(self) -> ImageCounts:
        return count_by_image(self.truth, self.found, self.judgement)

    def values(self) -> dict[str, float | None]:
        """Metrics in percent, and duplicates per object."""
        ratios = {name: _divide(above.sum(), below.sum()) for name, (above, below) in self._ratios().items()}
        return self.precision.metrics | ratios

    def samples(self, weights: np.ndarray) -> Samples:
        """The same of each sample; see :func:`dino_d2.report.intervals.draw_samples`."""
        samples = resample(self.truth, self.found, self.matches, weights)
        samples.metrics.update({name: ratio(*parts, weights) for name, parts in self._ratios().items()})
        return samples

    def _ratios(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Metrics that are ratios of sums over images: numerators and denominators."""
        right, wrong, missed = self.counts.right, self.counts.wrong, self.counts.missed
        return {
            "F1": (200 * right, 2 * right + wrong + missed),
            "precision": (100 * right, right + wrong),
            "recall": (100 * right, right + missed),
            "duplicates_per_object": (self.counts.duplicate, right + missed),
        }


@dataclass(frozen=True)
class ImageCounts:
    """right, wrong, duplicate: (images,) int64, sure detections; duplicates are wrong, too. missed: objects."""

    right: np.ndarray
    wrong: np.ndarray
    duplicate: np.ndarray
    missed: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(images,) in percent; 100 where there is nothing to find and nothing found."""
        total = 2 * self.right + self.wrong + self.missed
        return np.where(total > 0, 200 * self.right / np.maximum(total, 1), 100.0)


def evaluate_model(truth: Truth, detections: Iterable[dict[str, Any]], options: NumbersOptions, errors: bool) -> Model:
    """
    Args:
        detections: in COCO's results format.
        errors: also compute TIDE and calibration.

    Raises:
        ValueError: see :func:`dino_d2.report.dataset.read_found`.
    """
    found = read_found(detections, truth, options.max_dets)
    evaluation = ap.evaluate(truth, found, options.max_dets)
    precision = ap.average_precision(evaluation, options.max_dets)
    tide, calibration = (ap.tide(evaluation), ap.calibration(evaluation)) if errors else (None, None)
    del evaluation  # it holds several hundred megabytes
    pairs = overlapping(truth, found)
    matches = match(truth, found, pairs)
    threshold, chosen = options.threshold, False
    if threshold is None:
        best = best_f1(scored_matches(truth, found, matches))[1]
        threshold, chosen = (best, True) if np.isfinite(best) else (DEFAULT_THRESHOLD, False)
    judgement = judge(truth, found, pairs, matches, threshold)
    return Model(truth, found, matches, judgement, chosen, precision, tide, calibration)


def scored_matches(truth: Truth, found: Found, matches: Matches, label: int | None = None) -> ScoredMatches:
    """Matches at IoU 0.5, of one class or of all."""
    status = matches.status[0, 0]
    here, counted = status != IGNORED, matches.counted[0]
    if label is not None:
        here, counted = here & (found.label == label), counted & (truth.label == label)
    return ScoredMatches(found.score[here], status[here] == RIGHT, int(counted.sum()))


def count_by_image(truth: Truth, found: Found, judgement: Judgement) -> ImageCounts:
    right = judgement.sure & judgement.is_kind("right")
    wrong = judgement.sure & ~right & ~judgement.is_kind("ignored")
    missed = ~judgement.found & ~truth.crowd
    twice = wrong & judgement.is_kind("duplicate")
    images = (found.image[right], found.image[wrong], found.image[twice], truth.image[missed])
    return ImageCounts(*(np.bincount(x, minlength=len(truth.ids)) for x in images))


def metric(value: float | None, samples: np.ndarray | None, bounds: tuple[float, float]) -> dict[str, float | None]:
    """A value and its interval."""
    low, high = (None, None) if samples is None or value is None else interval(value, samples, bounds)
    return {"value": value, "low": low, "high": high}


def _divide(above: float, below: float) -> float | None:
    return float(above / below) if below else None
