"""The bootstrap is that of a dataset in which images are repeated."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from dino_d2.report import intervals
from dino_d2.report.intervals import AP_METRICS, draw_samples, interval, resample
from dino_d2.report.matches import match, overlapping
from dino_d2.report.model import Model, NumbersOptions, evaluate_model
from tests.evaluation.generated import Generated, generate
from tests.evaluation.test_hotcoco import by_pycocotools
from tests.report.known import perfect, rename_detection
from tests.report.test_matches import read
from tests.report.test_numbers import report


def repeated(made: Generated, times: list[int]) -> Generated:
    """Each image as often as `times` says."""
    dataset = {"images": [], "annotations": [], "categories": made.dataset["categories"]}
    detections = []
    images = sorted(made.dataset["images"], key=lambda image: image["id"])
    for image, number in zip(images, times, strict=True):
        for _ in range(number):
            new = len(dataset["images"]) + 1
            dataset["images"].append(image | {"id": new})
            for entry in made.dataset["annotations"]:
                if entry["image_id"] == image["id"]:
                    ids = {"id": len(dataset["annotations"]) + 1, "image_id": new}
                    dataset["annotations"].append(copy.deepcopy(entry) | ids)
            found = (x for x in made.detections if x["image_id"] == image["id"])
            detections += [copy.deepcopy(x) | {"image_id": new} for x in found]
    return Generated(dataset, detections)


@pytest.mark.parametrize("arguments", [(12, 3, 9, 40), (12, 1, 20, 60), (10, 20, 9, 60)])
def test_samples_are_those_of_pycocotools(arguments: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "AT_ONCE", 300)  # several parts
    made = generate(*arguments)
    for number, detection in enumerate(made.detections):
        detection["score"] = 0.9 * detection["score"] + 1e-6 * number  # no ties between images: their order would count
    truth, found = read(made, tmp_path)
    matches = match(truth, found, overlapping(truth, found))
    times = np.random.default_rng(1).integers(0, 4, (len(truth.ids), 4))
    times[:, 0] = 1
    samples = resample(truth, found, matches, times.astype(np.float32))
    for number in range(times.shape[1]):
        evaluation = by_pycocotools(repeated(made, times[:, number].tolist()), 100)
        mine = [samples.metrics[name][number] for name in AP_METRICS]
        assert mine == pytest.approx(100 * evaluation.stats[:6], abs=0.1)  # recalls of exactly k % may count or not
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        known = ~(precision == -1).all((0, 1))
        assert np.array_equal(np.isfinite(samples.classes[:, number]), known)
        assert samples.classes[known, number] == pytest.approx(100 * precision.mean((0, 1))[known], abs=1)
        assert samples.classes50[known, number] == pytest.approx(100 * precision[0].mean(0)[known], abs=1.5)


def test_interval_of_a_ratio(tmp_path: Path) -> None:
    """Recall is 2 / 3 in one image of eight, which is drawn up to three times in nearly all samples."""
    numbers = report(perfect().changed(rename_detection), tmp_path, NumbersOptions(resamples=400, threshold=0.3))
    recall, duplicates = numbers["metrics"]["recall"], numbers["metrics"]["duplicates_per_object"]
    assert recall["low"] == pytest.approx(2 * (100 - 100 / 24) - 100)
    assert recall["high"] == 100  # not 2 * (100 - 1 / 24) - (100 - 3 / 24)
    assert duplicates == {"value": 0, "low": 0, "high": 0}


def test_draws_have_as_many_images_as_the_dataset() -> None:
    drawn = draw_samples(50, 200, seed=0)
    assert drawn.shape == (50, 200)
    assert (drawn.sum(0) == 50).all()
    assert drawn.mean() == 1
    assert np.array_equal(drawn, draw_samples(50, 200, seed=0))
    assert not np.array_equal(drawn, draw_samples(50, 200, seed=1))


def test_interval_turns_the_samples_about_the_value() -> None:
    samples = np.array([np.nan, *range(101)])
    assert interval(40, samples) == pytest.approx((80 - 97.5, 80 - 2.5))
    assert interval(40, samples, (0, 50)) == (0, 50)
    assert interval(40, np.full(3, np.nan)) == (None, None)


def test_intervals_hold(tmp_path: Path) -> None:
    """They hold what a model has on very many images. AP of few images is too high, percentiles even more."""
    options = NumbersOptions(threshold=0.5)

    def model_of(images: int, seed: int) -> Model:
        made = generate(images, 3, 7, 20, seed)
        return evaluate_model(read(made, tmp_path)[0], made.detections, options, errors=False)

    truth = model_of(2000, 99).values()
    weights = draw_samples(60, 100, seed=0)
    held = dict.fromkeys(("AP", "AP50", "F1", "recall"), 0)
    for seed in range(20):
        model = model_of(60, seed)
        values, samples = model.values(), model.samples(weights).metrics
        for name in held:
            low, high = interval(values[name], samples[name])
            held[name] += low <= truth[name] <= high
    assert min(held.values()) >= 17, held


def intervals_of(made: Generated, folder: Path, **options: int) -> dict:
    return report(made, folder, NumbersOptions(**({"resamples": 200} | options)))["metrics"]


def test_intervals_depend_on_the_seed_alone(tmp_path: Path) -> None:
    made = generate(30, 3, 7, 30)
    assert intervals_of(made, tmp_path) == intervals_of(made, tmp_path)
    assert intervals_of(made, tmp_path) != intervals_of(made, tmp_path, seed=1)


def test_intervals_contain_the_value_and_are_narrower_with_more_images(tmp_path: Path) -> None:
    few, many = (intervals_of(generate(images, 3, 7, 30), tmp_path) for images in (30, 270))
    for name in (*AP_METRICS, "F1", "precision", "recall"):
        assert few[name]["low"] < few[name]["value"] < few[name]["high"]
        assert many[name]["low"] < many[name]["value"] < many[name]["high"]
        width = [metrics[name]["high"] - metrics[name]["low"] for metrics in (few, many)]
        assert width[1] < 0.6 * width[0]  # about a third
