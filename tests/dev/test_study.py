"""The command line of dev/study.py; tests/studies/ tests what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def study(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "dev" / "study.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_help_starts_with_examples() -> None:
    assert study("--help").stdout.startswith("Examples:\n    study.py data studies/few_photos.yaml")


def test_errors_are_one_line(tmp_path: Path) -> None:
    """Paths are relative to the user's folder."""
    (tmp_path / "mine.yaml").write_text("budget: 5")
    done = study("status", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"study.py: {tmp_path / 'mine.yaml'}: evaluate_at is missing or empty"]
    assert "study.py: argument command: invalid choice" in study("walk", "mine.yaml").stderr


@pytest.mark.parametrize("command", ["status", "table"])
def test_few_photos(command: str) -> None:
    done = study(command, "studies/few_photos.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trees") >= 8  # three detectors with three seeds; two with results at four moments
