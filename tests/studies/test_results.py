"""The table, the plot and the version of the code."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from studies import curves
from studies.plan import Study
from studies.results import (
    CODE,
    NOT_IN_A_RUN,
    OF_DINO,
    OF_PEERS,
    ROOT,
    Evaluation,
    Result,
    Version,
    code_of,
    code_version,
    mean_and_deviation,
    read_result,
    table,
    write_result,
)
from studies.training import as_metrics

VERSION = Version("abc", "2", "digest", "digest", 60)
DINO = {"config": "small/dino_mobilenetv2_640"}


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return make_study(detectors={"a": DINO, "b": DINO}, seeds=[1, 2, 3], budget=60, evaluate_at=[30, 60])


def results_of(study: Study) -> Iterator[Result]:
    """The third seed of b is missing."""
    for run in study.runs():
        if (run.detector.name, run.seed) == ("b", 3):
            continue
        final = 10.0 * run.seed + (5 if run.detector.name == "b" else 0)
        moments = (30, 30, final / 2), (60, 60, final)
        evaluations = tuple(Evaluation(s, n, {"AP": ap, "AP50": ap + 30}) for s, n, ap in moments)
        yield Result(run.data.name, run.detector.name, run.seed, VERSION, 1.0, "a processor", evaluations)


def test_table_has_mean_deviation_and_every_seed(study: Study) -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table(study, [*results_of(study)]).split("\n")
    ]
    assert lines[0] == ["data", "detector", "seconds", "AP", "seeds 1, 2, 3", "AP50", "seeds 1, 2, 3"]
    assert lines[2:] == [
        ["shapes", "a", "30", "10.0 ± 5.0", "5.0, 10.0, 15.0", "40.0 ± 5.0", "35.0, 40.0, 45.0"],
        ["shapes", "a", "60", "20.0 ± 10.0", "10.0, 20.0, 30.0", "50.0 ± 10.0", "40.0, 50.0, 60.0"],
        ["shapes", "b", "30", "10.0 ± 3.5", "7.5, 12.5, –", "40.0 ± 3.5", "37.5, 42.5, –"],
        ["shapes", "b", "60", "20.0 ± 7.1", "15.0, 25.0, –", "50.0 ± 7.1", "45.0, 55.0, –"],
    ]


def test_detector_without_results_is_not_in_the_table(study: Study) -> None:
    of_a = [result for result in results_of(study) if result.detector == "a"]
    assert table(study, of_a).split("\n")[2:] == table(study, [*results_of(study)]).split("\n")[2:4]


def test_detectors_that_drop_duplicates_stand_beside_those_that_need_not(study: Study) -> None:
    result = next(results_of(study))
    both = replace(result, evaluations=(Evaluation(30, 30, {"AP": 1.0, "APs": 3.0, "AP_nms": 2.0}),))
    assert (both.metric("AP_nms", 30), both.metric("APs_nms", 30)) == (2.0, None)
    assert result.metric("AP_nms", 30) == result.metric("AP", 30) is not None
    assert result.metric("duplicates_nms", 30) is None


def test_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([2, 4, 4, 4, 5, 5, 7, 9]) == "5.0 ± 2.1"
    assert mean_and_deviation([3.25]) == "3.2 ± –"


def test_results_are_read_as_they_were_written(study: Study) -> None:
    run = study.runs()[0]
    result = next(results_of(study))
    assert read_result(study, run) is None
    write_result(study, run, result)
    assert read_result(study, run) == result


def test_plot_is_written(study: Study, tmp_path: Path) -> None:
    found = [*results_of(study)]
    curves.draw(study, found, tmp_path / "new" / "all.png")
    curves.draw(study, found[:1], tmp_path / "one.png")
    every, one = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("new/all.png", "one.png"))
    assert every.shape == one.shape
    assert np.abs(every - one).sum() > 0  # the rest is drawn too
    with pytest.raises(ValueError, match=r"tiny.yaml: no results to plot"):
        curves.draw(study, [], tmp_path / "none.png")


def test_everything_is_inside_its_panel(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study(data={"a": None, "b": None}, seeds=[1], budget=60, evaluate_at=[30, 60])
    found = []
    for run in study.runs():
        ap = 5.0 if run.data.name == "a" else 60.0
        evaluations = tuple(Evaluation(s, s, {"AP": ap, "AP50": ap + 30}) for s in (30, 60))
        found.append(Result(run.data.name, run.detector.name, 1, VERSION, 1.0, "a processor", evaluations))
    for axis in curves.draw(study, found, tmp_path / "curves.png").axes:
        bottom, top = axis.get_ylim()
        heights = [height for line in axis.lines for height in line.get_ydata()]
        assert heights
        assert bottom == 0 < max(heights) < top


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ({}, []),
        ({"code": "def"}, ["code was abc, is now def"]),
        ({"torch": "3", "iterations": 61}, ["torch was 2, is now 3", "iterations was 60, is now 61"]),
        ({"data": None, "iterations": None}, []),
    ],
)
def test_differences_of_versions(others: dict[str, Any], found: list[str]) -> None:
    assert VERSION.differences(replace(VERSION, **others)) == found


def test_code_version_follows_what_results_depend_on(tmp_path: Path, git: Callable[..., str]) -> None:
    def version() -> str:
        return code_version(tmp_path, ["code"])

    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    first = git(tmp_path, "first")
    assert version() == first
    (tmp_path / "other.md").write_text("1")
    git(tmp_path, "elsewhere")
    assert version() == first
    (tmp_path / "code" / "a.py").write_text("2")
    changed = version()
    assert changed.startswith(f"{first}+")
    (tmp_path / "code" / "b.py").write_text("2")
    assert version() not in (first, changed)
    second = git(tmp_path, "second")
    assert version() == second != first


def test_peers_do_not_depend_on_dino(make_study: Callable[..., Study]) -> None:
    """A commit to DINO's decoder leaves the results of the peers as they are, one to the backbones does not."""
    study = make_study(detectors={"dino": DINO, "peer": {"config": str(ROOT / "studies" / "peers.yaml")}})
    asked: list[tuple[str, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.results.code_version", lambda root, paths: asked.append(tuple(paths)))
        for pair in study.pairs():
            code_of(study, *pair)
    files = [subprocess.run(["git", "-C", ROOT, "ls-files", "--", *paths], capture_output=True, text=True, check=True)
             .stdout.split() for paths in asked]  # fmt: skip
    of_dino, of_peer = map(set, files)
    assert {"dino_d2/modeling/decoder.py", "dino_d2/meta_arch/dino.py"} <= of_dino - of_peer
    assert of_peer - of_dino == {"studies/peers.py"}
    assert {"dino_d2/modeling/backbone/timm_wrapper.py", "dino_d2/data/mapper.py"} <= of_dino & of_peer
    assert not {"dino_d2/app.py", "dino_d2/detector.py"} & of_dino


def test_code_version_needs_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a checkout"):
        code_version(tmp_path, ["."])


def test_what_results_depend_on_exists() -> None:
    others = [f"dino_d2/{name}" for name in NOT_IN_A_RUN]
    excluded = [path.rpartition(")")[2].removesuffix("/*.py") for path in (*OF_DINO, *OF_PEERS)]
    assert all((ROOT / path).exists() for path in (*CODE, *others, *excluded))


def test_no_detection_is_an_ap_of_0() -> None:
    nan = float("nan")
    assert as_metrics({"bbox": {"AP": nan, "AP50": nan, "AP75": nan, "APs": nan}}) == {
        "AP": 0.0, "AP50": 0.0, "AP75": 0.0, "APs": None,
    }  # fmt: skip
    assert as_metrics({"bbox": {"AP": 12.34567, "APs": nan}}) == {"AP": 12.3457, "APs": None}


def test_a_run_with_a_moving_average_is_judged_by_it() -> None:
    assert as_metrics({"bbox": {"AP": 1.0}, "ema": {"bbox": {"AP": 2.0}}}) == {"AP": 2.0}


def test_metrics_of_queries_and_with_nms_are_kept() -> None:
    assert as_metrics(
        {"bbox": {"AP": 1.0}, "queries": {"ATD100": 0.123456, "AP_layer1": float("nan")}, "nms": {"bbox": {"AP": 3.0}}}
    ) == {"AP": 1.0, "ATD100": 0.1235, "AP_layer1": None, "AP_nms": 3.0}
