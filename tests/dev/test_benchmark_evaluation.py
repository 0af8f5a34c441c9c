"""dev/benchmark_evaluation.py on a few images: both programs run and are compared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))

import benchmark_evaluation


@pytest.fixture(autouse=True)
def _unregister() -> Iterator[None]:
    yield
    DatasetCatalog.remove(benchmark_evaluation.NAME)
    MetadataCatalog.remove(benchmark_evaluation.NAME)


def test_both_programs_agree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_evaluation.py", "--images", "5"])
    benchmark_evaluation.main()
    printed = capsys.readouterr().out
    assert "| evaluating with pycocotools 2" in printed
    assert "| evaluating with hotcoco 1" in printed
    assert "all 86 metrics are exactly equal" in printed


def test_a_difference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = benchmark_evaluation.measure

    def wrong(backend: str, results: list, output_dir: str | None) -> tuple[float, float, dict]:
        *seconds, metrics = measure(backend, results, output_dir)
        return *seconds, metrics | {"AP50": 0.0 if backend == "hotcoco" else metrics["AP50"]}

    monkeypatch.setattr(benchmark_evaluation, "measure", wrong)
    monkeypatch.setattr(sys, "argv", ["benchmark_evaluation.py", "--images", "5"])
    with pytest.raises(SystemExit, match=r"AP differs: AP50 \d"):
        benchmark_evaluation.main()
