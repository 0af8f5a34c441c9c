"""All numbers of a report, from the annotations of a dataset and the detections of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from dino_d2.data import CocoFiles
from dino_d2.detections import DEFAULT_THRESHOLD
from dino_d2.evaluation import f1

from . import ap, cases
from .dataset import Found, Truth, read_found, read_truth
from .errors import BACKGROUND, LISTED, Judgement, confusion, judge
from .intervals import draw_samples, interval, ratio, resample
from .label_errors import LabelError, label_errors, sure_score
from .matches import IGNORED, RIGHT, Matches, match, overlapping
from .slices import neighbours, slices

FORMAT = 1
THRESHOLDS = np.linspace(0, 1, 101)  # of the curves of F1
CONFUSED = 3  # classes that a class is most often taken for
FEWEST_DETS = 10  # hotcoco's limit


@dataclass(frozen=True)
class NumbersOptions:
    """max_dets: detections of an image and class that count. threshold: score that a detection must exceed for
    precision, recall and the like, in [0, 1); None: the one with the best F1. resamples: for intervals; 0: none.
    gallery: number of images that are shown.

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
        if self.resamples < 0 or self.gallery < 0 or self.seed < 0:
            raise ValueError("resamples, gallery and seed must not be negative")
