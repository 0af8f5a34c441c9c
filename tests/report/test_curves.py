"""Curves of made-up runs, and tools/plot_run.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dino_d2.report.curves import draw, read_curves
from dino_d2.tools.plot_run import main


def write_run(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [
        {"iteration": i, "total_loss": 9.0 - i, "loss_ce": 1.0, "loss_ce_0": 2.0, "loss_bbox_dn": 3.0, "lr_rest": 1e-4}
        for i in range(4)
    ]
    return write_run(tmp_path / "first", [*lines, {"iteration": 3, "bbox/AP": 20.0, "bbox/APl": float("nan")}])


def test_losses_are_read_in_groups(run: Path) -> None:
    curves = read_curves(run)
    assert set(curves) == {"total_loss", "class", "denoising", "lr_rest", "bbox/AP"}
    assert curves["class"] == dict.fromkeys(range(4), 3.0)
    assert curves["bbox/AP"] == {3: 20.0}
    assert read_curves(run / "metrics.json") == curves


def test_later_record_of_an_iteration_counts_and_what_is_not_finite_does_not(tmp_path: Path) -> None:
    lines = [{"iteration": 1, "total_loss": 5.0}, {"iteration": 1, "total_loss": 4.0}]
    run = write_run(tmp_path / "resumed", [*lines, {"iteration": 2, "total_loss": float("nan")}])
    assert read_curves(run) == {"total_loss": {1: 4.0}}


def test_picture_grows_with_the_panels_and_runs_may_differ(run: Path, tmp_path: Path) -> None:
    curves = read_curves(run)
    draw({"one": curves}, tmp_path / "one.png")
    draw({"one": {"total_loss": curves["total_loss"]}, "other": {"bbox/AP": {7: 1.0}}}, tmp_path / "two.png")
    assert Image.open(tmp_path / "one.png").height > 1.5 * Image.open(tmp_path / "two.png").height


def test_formulas_as_names_are_drawn_as_they_are(run: Path, tmp_path: Path) -> None:
    draw({"$100_$50": read_curves(run)}, tmp_path / "one.png")
    assert (tmp_path / "one.png").is_file()


def test_curves_of_several_runs_are_drawn_from_the_command_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_run(tmp_path / "second", [{"iteration": 0, "total_loss": 1.0}])
    picture = tmp_path / "new" / "curves.png"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run), str(other), "-o", str(picture)])
    main()
    colours = Image.open(picture).convert("RGB").getcolors(10**6)
    assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in colours}  # one of each run


@pytest.mark.parametrize(
    ("content", "error"), [(None, "metrics.json not found"), ("{}\n", "nothing"), ("{\n", "line 1 is not JSON")]
)
def test_run_that_cannot_be_drawn_is_named(content: str | None, error: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*{error}"):
        read_curves(tmp_path)
