"""A study of a tiny DINO and tiny peers on generated rectangles."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from studies.plan import DECIDED, Study, read_study
from studies.results import Pace, write_pace
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).parents[2]
VERSION = "abc"


def CODE(*_: object) -> str:
    """The version of the code in these tests."""
    return VERSION


def tiny_settings() -> dict[str, Any]:
    """What makes detectors tiny."""
    values = config_values((Path(), Path()), Path(), "unused")
    pairs = zip(values[::2], values[1::2], strict=True)
    tiny = {key: yaml.safe_load(value) for key, value in pairs if key not in DECIDED}
    return tiny | {"SOLVER.WARMUP_ITERS": 0, "MODEL.TIMM.PRETRAINED": False, "SOLVER.BASE_LR": 0.001}


def write_data(folder: Path) -> None:
    """`train.json` and `test.json`, which share their images."""
    annotations, images = write_rectangles(folder / "made", count=4, size=64)
    for part in ("train", "test"):
        (folder / f"{part}.json").write_text(annotations.read_text())
    images.rename(folder / "train")


def content_of(folder: Path) -> dict[str, Any]:
    return {
        "budget": 6,
        "evaluate_at": [2, 6],
        "seeds": [1, 2],
        "settings": tiny_settings(),
        "data": {"shapes": {"folder": str(folder)}},
        "detectors": {"dino": {"config": "small/dino_mobilenetv2_640"}},
    }


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """`write_study(seeds=[1])`: the file of the tiny study with other values."""

    def write(**others: Any) -> Path:
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(content_of(tmp_path / "data") | others))
        return file

    return write


@pytest.fixture
def make_study(tmp_path: Path, write_study: Callable[..., Path]) -> Callable[..., Study]:
    """`make_study(seeds=[1])`: the tiny study with data, and one second per step."""

    def make(**others: Any) -> Study:
        if not (tmp_path / "data").is_dir():
            write_data(tmp_path / "data")
        study = read_study(write_study(**others), tmp_path / "work")
        for data, detector in study.pairs():
            digest = study.cost_digest(data, detector)
            write_pace(study, data, detector, Pace(1.0, "a processor", 1, 0.0, VERSION, "2", digest))
        return study

    return make


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture
def git() -> Callable[..., str]:
    """`git(folder, "commit")`: commit everything there, in a repository made if needed; returns the short commit."""

    def run(folder: Path, *arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(folder), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(folder: Path, message: str) -> str:
        run(folder, "init", "--quiet")
        run(folder, "config", "uploadpack.allowFilter", "true")
        run(folder, "add", "--all")
        run(folder, "commit", "--quiet", "--message", message)
        return run(folder, "rev-parse", "--short=12", "HEAD")

    return commit
