"""Boxes that lie beside the annotated ones in one direction are noticed, and noise is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_d2.report.numbers import NumbersOptions, report_numbers

from .known import Known, perfect


def placement_of(made: Known, folder: Path) -> dict[str, Any] | None:
    numbers = report_numbers(made.write(folder), made.detections, {}, "known", NumbersOptions(resamples=0))
    return numbers["placement"]


def test_a_shift_and_a_growth_are_measured_in_percent_of_the_objects(tmp_path: Path) -> None:
    made = perfect()
    for found in made.detections:
        x, y, width, height = found["bbox"]  # 60 x 50 pixels
        found["bbox"] = [x - 12, y, width + 6, height - 5]
    result = placement_of(made, tmp_path)
    assert result["boxes"] == 24
    values = {key: result[key]["value"] for key in ("x", "y", "width", "height")}
    assert values == pytest.approx({"x": -15, "y": -5, "width": 10, "height": -10})
    assert result["x"]["low"] == result["x"]["high"] == pytest.approx(-15)


def test_noise_around_the_objects_is_no_shift(tmp_path: Path) -> None:
    made, random = perfect(), np.random.default_rng(1)
    for found in made.detections:
        found["bbox"][0] += float(random.normal(0, 6))
    x = placement_of(made, tmp_path)["x"]
    assert x["low"] < 0 < x["high"]
    assert x["low"] <= x["value"] <= x["high"]


def test_what_lies_on_no_object_of_its_class_does_not_count(tmp_path: Path) -> None:
    made = perfect()
    made.detections.append(made.detections[0] | {"bbox": [300.0, 300.0, 50.0, 50.0], "score": 0.9})
    assert placement_of(made, tmp_path)["boxes"] == 24


def test_a_few_boxes_say_nothing(tmp_path: Path) -> None:
    made = perfect()
    del made.detections[9:]
    assert placement_of(made, tmp_path) is None
