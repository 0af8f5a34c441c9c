from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))
import benchmark_op


@pytest.fixture(autouse=True)
def small_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_op, "FOUR_SCALES", [(8, 9), (4, 5), (2, 3), (1, 2)])
    monkeypatch.setattr(benchmark_op, "copy_bandwidth", lambda device: 1e10)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark_op.py", "--seconds", "0", *arguments])
    return benchmark_op.main()


@pytest.mark.parametrize("shape", ["4scale", "decoder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("locations", ["local", "random"])
def test_every_contestant_is_right_and_has_a_line(
    shape: str, dtype: str, locations: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "--shape", shape, "--dtype", dtype, "--locations", locations) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names[:4] == ["grid_sample", "dino_d2, plain", "softmax, locations, dino_d2 plain", "dino_d2, fused"]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = benchmark_op.ms_deform_attn_fused
    monkeypatch.setattr(benchmark_op, "ms_deform_attn_fused", lambda *arguments: right(*arguments) * 1.01)
    assert run(monkeypatch) == 1
    assert "wrong: dino_d2, fused" in capsys.readouterr().out


def test_local_samples_lie_near_their_query_and_random_ones_anywhere() -> None:
    for locations, near in (("local", True), ("random", False)):
        problem = benchmark_op.make_problem("4scale", locations, torch.float64, "cpu")
        distance = (problem.locations - problem.reference[:, :, None, :, None]).abs()
        assert (distance[:, :, :, 0].median() < 0.1) == near
        assert problem.offsets.shape[1] == sum(h * w for h, w in benchmark_op.FOUR_SCALES)


def test_missing_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda is not available"):
        run(monkeypatch, "--device", "cuda")
