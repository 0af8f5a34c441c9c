"""Which of two models is better, and where: differences with intervals by a paired bootstrap over images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dino_d2.data import CocoFiles

from .cases import choose_images
from .dataset import read_truth
from .gallery import found_of_image, image_entry, left_out_of_pictures, lowest_drawn, truth_of_image
from .intervals import interval
from .model import Model, NumbersOptions, evaluate_model
from .numbers import (
    FORMAT,
    dataset_entry,
    left_out_of_data,
    left_out_of_intervals,
    made,
    sample_weights,
    tidy,
)

COMPARED = ("AP", "AP50", "AP75", "APs", "APm", "APl", "F1", "precision", "recall", "duplicates_per_object")
NamedDetections = tuple[str, Iterable[dict[str, Any]]]


def compare_numbers(
    files: CocoFiles, first: NamedDetections, second: NamedDetections, options: NumbersOptions
) -> dict[str, Any]:
    """Everything that the page of a comparison shows, ready for JSON. Differences are second minus first.

    Both models are evaluated on the same samples of images, so that images that are hard for both do not matter.

    Args:
        first, second: name of the model, and its detections in COCO's results format.

    Raises:
        FileNotFoundError, ValueError: see :func:`dino_d2.report.numbers.report_numbers`.
    """
    truth = read_truth(files)
    models = [evaluate_model(truth, detections, options, errors=False) for _, detections in (first, second)]
    weights = sample_weights(truth, options)
    samples = None if weights is None else [model.samples(weights) for model in models]
    values = [model.values() for model in models]
    names = [first[0], second[0]]
    metrics = {
        name: _difference(*(x[name] for x in values), None if samples is None else [x.metrics[name] for x in samples])
        for name in COMPARED
    }
    objects = np.bincount(truth.label[~truth.crowd], minlength=len(truth.classes)).tolist()
    classes = [
        {"name": name, "objects": objects[label]}
        | _difference(
            *(model.precision.classes[label] for model in models),
            None if samples is None else [x.classes[label] for x in samples],
        )
        for label, name in enumerate(truth.classes)
    ]
    lowest = lowest_drawn(*(model.judgement.threshold for model in models))
    notes = dict.fromkeys(sentence for model in models for sentence in left_out_of_data(model))
    numbers = {
        "format": FORMAT,
        "made": made(),
        "names": names,
        "dataset": dataset_entry(truth, options),
        "thresholds": [model.judgement.threshold for model in models],
        "metrics": metrics,
        "classes": classes,
        "verdict": _verdict(names, metrics["AP"]),
        **_pictures(models, options.gallery, lowest),
        "left_out": [
            *notes,
            left_out_of_pictures(lowest),
            *_left_out_of_changes(models, options.gallery),
            *left_out_of_intervals(truth, options),
            "Of 20 classes that are equally good, about one looks significantly different by chance.",
        ],
    }
    return tidy(numbers, exact=("metrics", "thresholds"))


def _difference(first: float | None, second: float | None, samples: Sequence[np.ndarray] | None) -> dict[str, Any]:
    if first is None or second is None:
        difference, low, high = None, None, None
    else:
        difference = second - first
        low, high = (None, None) if samples is None else interval(difference, samples[1] - samples[0])
    significant = low is not None and (low > 0 or high < 0)
    return {"a": first, "b": second, "difference": difference, "low": low, "high": high, "significant": significant}


def _verdict(names: Sequence[str], ap: dict[str, Any]) -> str:
    difference, low, high = ap["difference"], ap["low"], ap["high"]
    if difference is None:
        return "There is nothing to compare: the dataset has no objects."
    if low is None:
        return f"{names[1]} has {difference:+.1f} AP; without an interval, this may be chance."
    if not ap["significant"]:
        return f"The difference is not significant: {difference:+.1f} AP (95 % interval {low:+.1f} to {high:+.1f})."
    better, sign = (names[1], 1) if difference > 0 else (names[0], -1)
    low, high = sorted((sign * low, sign * high))
    return f"{better} is better by {abs(difference):.1f} AP (95 % interval {low:.1f} to {high:.1f})."


def _pictures(models: Sequence[Model], number: int, lowest: float) -> dict[str, list]:
    """Images that changed most, in both directions.

    Args:
        number: of images, at most.
        lowest: score of the detections that are drawn.
    """
    change = _change(models)
    better, worse = (np.argsort(-sign * change, kind="stable") for sign in (1, -1))
    better, worse = better[change[better] > 0], worse[change[worse] < 0]
    gallery = choose_images([better, worse], number)
    place = {image: number for number, image in enumerate(gallery)}
    return {
        "images": [_image(models, image, lowest) for image in gallery],
        "better": [place[image] for image in better.tolist() if image in place],
        "worse": [place[image] for image in worse.tolist() if image in place],
    }


def _change(models: Sequence[Model]) -> np.ndarray:
    """(images,) F1 of the second model minus that of the first, in percent."""
    return models[1].counts.f1 - models[0].counts.f1


def _left_out_of_changes(models: Sequence[Model], number: int) -> list[str]:
    changed = int(np.count_nonzero(_change(models)))
    alike = len(models[0].truth.ids) - changed
    sentences = [f"{number} of the {changed} images with another F1 are shown."] if number < changed else []
    if alike:
        sentences.append(f"{alike} images on which both have the same F1 are not shown.")
    return sentences


def _image(models: Sequence[Model], image: int, lowest: float) -> dict[str, Any]:
    """In "truth" stands which objects the second model found, in "found_by_a" which the first."""
    entry = image_entry(models[1].truth, image) | {"truth": truth_of_image(models[1], image)}
    entry["found_by_a"] = [row[5] for row in truth_of_image(models[0], image)]
    for name, model in zip("ab", models, strict=True):
        entry[f"F1_{name}"] = float(model.counts.f1[image])
        entry[f"found_{name}"] = found_of_image(model, image, lowest)
    return entry
