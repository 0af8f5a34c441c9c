"""tools/export.py: what it refuses, and that it says what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from dino_d2 import DINO
from dino_d2.tools import export


@pytest.fixture
def arguments(tiny_config: Callable[..., CfgNode], tmp_path: Path) -> list[str]:
    """A command line for a tiny detector."""
    cfg = tiny_config(CLASS_NAMES=["ant", "bee", "cat", "dog", "elk"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "weights.pth")
    return [
        "--format", "onnx", "--config-file", str(tmp_path / "config.yaml"),
        "--weights", str(tmp_path / "weights.pth"), "-o", str(tmp_path / "out" / "tiny.onnx"),
    ]  # fmt: skip


def test_what_was_written_is_said(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(cfg: CfgNode, model: DINO, path: Path, half: bool) -> str:
        path.parent.mkdir()
        path.write_bytes(b"0" * 2_500_000)
        return f"half {half}, {model.assumptions.class_names[1]}"

    monkeypatch.setattr("dino_d2.deploy.export.export_onnx", write)
    export.main([*arguments, "--half"])
    assert f"{tmp_path / 'out' / 'tiny.onnx'}: 2.5 MB; half True, bee" in capsys.readouterr().out


def test_what_a_file_would_not_do_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export.main([*arguments, "TEST.AUG.ENABLED", "True"])
    assert "TEST.AUG.ENABLED" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--format", "onnx", "--config-file", "x", "--weights", "nowhere.pth", "-o", "y"])
    assert "weights nowhere.pth not found" in capsys.readouterr().err
