"""dev/benchmark_page.py on a few images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))
import benchmark_page


def test_prints_seconds_and_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    case = "report without intervals"
    monkeypatch.setattr(sys, "argv", ["benchmark_page.py", "--images", "3", "--case", case])
    benchmark_page.main()
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    part, _, _, memory, size = row
    assert part == case
    assert float(memory) > 0.1
    assert float(size) > 0
