"""All numbers of a report, from the annotations of a dataset and the detections of a model."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np

from dino_d2.data import CocoFiles
from dino_d2.evaluation.f1 import Matches as ScoredMatches
from dino_d2.evaluation.f1 import best_f1

from .dataset import Truth, read_truth
from .errors import BACKGROUND, LISTED, confusion
from .gallery import choose_gallery, left_out_of_errors, left_out_of_gallery, show
from .intervals import PERCENT, Samples, draw_samples
from .label_errors import label_errors
from .model import Model, NumbersOptions, evaluate_model, metric, scored_matches
from .placement import placement
from .slices import neighbours, slices

__all__ = ["NumbersOptions", "report_numbers"]

FORMAT = 1  # of report.json
CURVE = np.linspace(0, 1, 101)  # thresholds of the curves of F1
CONFUSED = 3  # classes that a class is most often taken for


def report_numbers(
    files: CocoFiles,
    detections: Iterable[dict[str, Any]],
    about: dict[str, str],
    title: str,
    options: NumbersOptions,
    queries: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that the page of a report shows, ready for JSON: numbers that are not known are None.

    Percentages are in [0, 100], scores and calibration in [0, 1]; boxes are x1, y1, x2, y2 in pixels.

    Args:
        detections: in COCO's results format.
        about: text by its label, shown as it is.
        queries: metrics of :class:`dino_d2.evaluation.QueryEvaluator`.

    Raises:
        FileNotFoundError, ValueError: see :func:`dino_d2.report.dataset.read_truth` and
            :func:`dino_d2.report.dataset.read_found`.
    """
    truth = read_truth(files)
    model = evaluate_model(truth, detections, options, errors=True)
    weights = sample_weights(truth, options)
    samples = None if weights is None else model.samples(weights)
    near = neighbours(truth)
    errors = label_errors(truth, model.found, model.judgement, near)
    gallery = choose_gallery(model, errors, options.gallery)
    cells = confusion(truth, model.found, model.judgement, gallery)
    values = model.values()
    numbers = {
        "format": FORMAT,
        "title": title,
        "made": made(),
        "about": about,
        "dataset": dataset_entry(truth, options)
        | {"detections": model.found.given, "detections_counted": len(model.found)},
        "threshold": {"score": model.judgement.threshold, "chosen": model.chosen},
        "metrics": _metrics(values, samples),
        "queries": queries,
        "classes": _classes(model, samples, cells),
        "f1": _f1_curve(scored_matches(truth, model.found, model.matches)),
        "tide": model.tide,
        "placement": placement(truth, model.found, model.judgement),
        "confusion": {"cells": cells},
        "calibration": model.calibration,
        "slices": slices(truth, model.judgement.found, near, [values[name] for name in ("APs", "APm", "APl")], weights),
        **show(model, gallery, errors),
        "left_out": [
            *left_out_of_data(model),
            *left_out_of_gallery(model, gallery),
            f"Cells of the confusion matrix name at most {LISTED} images.",
            *left_out_of_errors(errors, gallery),
            *left_out_of_intervals(truth, options),
        ],
    }
    return tidy(numbers, exact=("metrics", "threshold"))


def sample_weights(truth: Truth, options: NumbersOptions) -> np.ndarray | None:
    """How often each image is in each bootstrap sample; None without intervals."""
    if not options.resamples or len(truth.ids) < 2:
        return None
    return draw_samples(len(truth.ids), options.resamples, options.seed)


def dataset_entry(truth: Truth, options: NumbersOptions) -> dict[str, int]:
    objects = int((~truth.crowd).sum())
    return {
        "images": len(truth.ids),
        "objects": objects,
        "crowds": len(truth.crowd) - objects,
        "max_dets": options.max_dets,
    }


def made() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M")


def tidy(value: Any, exact: tuple[str, ...] = ()) -> Any:
    """Ready for JSON: NaN is None, and numbers have four decimals, except under the keys `exact`."""
    if isinstance(value, dict):
        return {key: x if key in exact else tidy(x, exact) for key, x in value.items()}
    if isinstance(value, list):
        return [tidy(x, exact) for x in value]
    if isinstance(value, float):  # NumPy's float64, too
        return round(float(value), 4) if np.isfinite(value) else None
    return value


def left_out_of_intervals(truth: Truth, options: NumbersOptions) -> list[str]:
    if not options.resamples:
        return ["There are no intervals: they were switched off."]
    if len(truth.ids) < 2:
        return ["There are no intervals: they need two images."]
    return [
        f"95 % intervals are basic bootstrap intervals, from {options.resamples} samples of the images. They say how "
        "much depends on the choice of images, not on the random numbers of a training run."
    ]


def left_out_of_data(model: Model) -> list[str]:
    sentences = list(model.truth.notes)
    beyond = model.found.given - len(model.found)
    if beyond:
        sentences.append(f"{beyond} detections do not count: they are not among the best of their image and class.")
    if model.chosen:
        sentences.append(
            "The threshold was chosen on these images, and is the same in all bootstrap samples: on other images, F1, "
            "precision and recall may be a little lower."
        )
    return sentences


def _metrics(values: dict[str, float | None], samples: Samples | None) -> dict[str, dict[str, float | None]]:
    bounds = dict.fromkeys(values, PERCENT) | {"duplicates_per_object": (0, np.inf)}
    return {
        name: metric(value, samples.metrics[name] if samples else None, bounds[name]) for name, value in values.items()
    }


def _classes(model: Model, samples: Samples | None, cells: list[list]) -> list[dict[str, Any]]:
    truth, found, judgement = model.truth, model.found, model.judgement
    number = len(truth.classes)
    objects = np.bincount(truth.label[~truth.crowd], minlength=number)
    pairs = np.unique(np.stack([truth.label, truth.image], axis=1)[~truth.crowd], axis=0)
    images = np.bincount(pairs[:, 0], minlength=number)
    right = judgement.sure & judgement.is_kind("right")
    all_sure = judgement.sure & ~judgement.is_kind("ignored")
    hits, sure = (np.bincount(found.label[x], minlength=number) for x in (right, all_sure))
    confused = _confused_with(cells, number)
    rows = []
    for label, name in enumerate(truth.classes):
        matches = scored_matches(truth, found, model.matches, label)
        best, threshold = best_f1(matches)
        ap = metric(model.precision.classes[label], samples.classes[label] if samples else None, PERCENT)
        rows.append(
            {
                "name": name,
                "objects": int(objects[label]),
                "images": int(images[label]),
                "AP": ap["value"],
                "AP_low": ap["low"],
                "AP_high": ap["high"],
                "AP50": model.precision.classes50[label],
                "precision": 100 * hits[label] / sure[label] if sure[label] else None,
                "recall": 100 * hits[label] / objects[label] if objects[label] else None,
                "best_threshold": threshold,
                "best_F1": 100 * best,
                "confused_with": confused[label],
                "pr": model.precision.curves[:, label].tolist() if objects[label] else None,
                "f1": _f1_curve(matches),
            }
        )
    return rows


def _confused_with(cells: list[list], classes: int) -> list[list[list[int]]]:
    confused: list[list[list[int]]] = [[] for _ in range(classes)]
    for true, other, count, _ in sorted(cells, key=lambda cell: -cell[2]):
        if BACKGROUND not in (true, other) and true != other and len(confused[true]) < CONFUSED:
            confused[true].append([other, count])
    return confused


def _f1_curve(matches: ScoredMatches) -> list[list[float]] | None:
    """Thresholds, and F1 in percent of the detections that score more; None without objects."""
    if not matches.objects:
        return None
    all_scores, right = np.sort(matches.scores), np.sort(matches.scores[matches.right])
    above, hits = (len(x) - np.searchsorted(x, CURVE, side="right") for x in (all_scores, right))
    return [CURVE.tolist(), (200 * hits / (above + matches.objects)).tolist()]
