"""Runs of a study: in which order, resumed how, refused when."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studies import schedule, training
from studies.plan import Study
from studies.results import pace_of, read_paces, read_result, result_file, write_pace, write_result
from studies.schedule import folder_of, measure, run_study, states, usable, what_is_left
from tests.studies.conftest import CODE, ROOT, VERSION, read_json

PEER = {
    "config": str(ROOT / "studies" / "peers.yaml"),
    "settings": {
        "MODEL.META_ARCHITECTURE": "TorchvisionRetinaNet",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32]],
        "TEST.DETECTIONS_PER_IMAGE": 5,
        "MODEL.FPN.OUT_CHANNELS": 32,
    },
}
BOTH = {"dino": {"config": "small/dino_mobilenetv2_640"}, "retinanet": PEER}
NOW = {"AP": 1.0, "AP50": 2.0}


def older(*_: object) -> str:
    """Another version of the code."""
    return "older"


class Killed(BaseException):
    """Ends a process at once."""


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Instead of training, note the folder and the length of each run."""
    trained: list[tuple[str, int]] = []

    def train(cfg: Any, iterations: list[int], say: object) -> dict[int, Any]:
        trained.append((cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER))
        return {done: NOW | {"iterations": done} for done in iterations}

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "keep_weights", lambda folder: None)
    return trained


def silent(line: str) -> None:
    pass


def test_a_study_runs_once(make_study: Callable[..., Study]) -> None:
    """Two detectors, trained and evaluated; a second call has nothing left to do."""
    study = make_study(detectors=BOTH, seeds=[1], budget=3, evaluate_at=[1, 3])
    lines: list[str] = []
    run_study(study, CODE, False, lines.append)
    assert lines[-1].startswith("tiny: 2 of 2 runs finished, 0 minutes of training left")
    for run in study.runs():
        result = read_result(study, run)
        assert [(x.at, x.iterations) for x in result.evaluations] == [(1, 1), (3, 3)]
        assert all(0 <= x.metrics[name] <= 100 for x in result.evaluations for name in ("AP", "AP50"))
        assert (result.measured_on, result.version.code, result.version.iterations) == ("a processor", VERSION, 3)
        assert [file.name for file in folder_of(study, run).glob("*.pth")] == ["model_final.pth"]
    before = {file: file.stat().st_mtime_ns for file in study.results.rglob("*.json")}
    lines.clear()
    run_study(study, CODE, False, lines.append)
    assert lines == []
    assert {file: file.stat().st_mtime_ns for file in study.results.rglob("*.json")} == before


@pytest.mark.parametrize(
    ("detector", "moment"),
    [("dino", 3), ("dino", 4), ("retinanet", 3)],
    ids=["between checkpoints", "in the last evaluation", "a peer"],
)
def test_a_killed_run_goes_on(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, detector: str, moment: int
) -> None:
    """It is killed in an evaluation, at the end or with its newest checkpoint one step behind; its result is that of
    a run that was not."""
    monkeypatch.setattr("studies.plan.SAVES", 2)  # after 2 of 4 steps
    study = make_study(detectors={detector: BOTH[detector]}, seeds=[1], budget=4, evaluate_at=[1, 3, 4])
    (run,) = study.runs()
    evaluate = training.StudyTrainer.evaluate

    def killed_at(trainer: training.StudyTrainer) -> dict[str, Any]:
        if trainer.iter + 1 == moment:
            raise Killed
        return evaluate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(training.StudyTrainer, "evaluate", killed_at)
        with pytest.raises(Killed):
            run_study(study, CODE, False, silent)
    assert read_result(study, run) is None
    assert 1 in training.read_evaluations(folder_of(study, run) / training.EVALUATIONS)
    lines: list[str] = []
    run_study(study, CODE, False, lines.append)
    assert "resuming" in lines[1]
    resumed = read_json(result_file(study, run))

    result_file(study, run).unlink()
    (folder_of(study, run) / "last_checkpoint").unlink()  # so it starts anew
    run_study(study, CODE, False, silent)
    assert read_json(result_file(study, run)) == resumed


def test_a_run_killed_before_its_result_is_written_is_not_trained_again(
    make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(seeds=[1], budget=2, evaluate_at=[2])

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "write_result", killed)
        with pytest.raises(Killed):
            run_study(study, CODE, False, silent)
        patch.undo()
        patch.setattr(training.StudyTrainer, "run_step", killed)
        run_study(study, CODE, False, silent)
    assert read_result(study, study.runs()[0]).evaluations[0].iterations == 2


def test_what_is_left_of_another_version_is_not_resumed(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]]
) -> None:
    study = make_study(seeds=[1])
    (run,) = study.runs()
    folder = folder_of(study, run)
    (state,) = states(study, older)
    folder.mkdir(parents=True)
    schedule._write(folder, state.version)
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    assert [state.done for state in states(study, older)] == [4]
    assert "4 of 6 iterations" in str(states(study, older)[0])
    assert [state.done for state in states(study, CODE)] == [0]
    run_study(study, CODE, False, silent)
    assert not (folder / "last_checkpoint").exists()


def test_runs_come_one_after_the_other_and_say_what_is_left(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]]
) -> None:
    study = make_study(detectors=BOTH, budget=600, evaluate_at=[60, 600])
    for data, detector in study.pairs():
        pace = replace(pace_of(study, data, detector), seconds_per_step=1.5 if detector.name == "dino" else 0.7)
        write_pace(study, data, detector, pace)
    lines: list[str] = []
    run_study(study, CODE, False, lines.append)
    order = ("dino/seed_1", "retinanet/seed_1", "dino/seed_2", "retinanet/seed_2")
    assert no_training == [
        (str(study.work / "tiny" / "shapes" / name), 400 if "dino" in name else 857) for name in order
    ]
    left = [line for line in lines if "runs finished" in line]
    assert left[0].startswith("tiny: 1 of 4 runs finished, 30 minutes of training left")
    assert left[-1].startswith("tiny: 4 of 4 runs finished, 0 minutes of training left")
    assert [x.iterations for x in read_result(study, study.runs()[0]).evaluations] == [40, 400]


def test_a_run_that_diverges_does_not_keep_the_others_from_running(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(detectors=BOTH, seeds=[1])
    train = training.train

    def diverging(cfg: Any, *others: Any) -> Any:
        if "dino" in cfg.OUTPUT_DIR:
            raise FloatingPointError("the loss of iteration 3 is not finite")
        return train(cfg, *others)

    monkeypatch.setattr(training, "train", diverging)
    lines: list[str] = []
    with pytest.raises(FloatingPointError, match=r"not finite: shapes/dino/seed_1$"):
        run_study(study, CODE, False, lines.append)
    assert "  the loss of iteration 3 is not finite" in lines
    assert [state.finished for state in states(study, CODE)] == [False, True]


def test_what_was_not_made_is_said_before_anything_runs(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]], tmp_path: Path
) -> None:
    data = {"shapes": {"folder": str(tmp_path / "data")}}
    study = make_study(data=data | {"other": {"folder": str(tmp_path / "none")}})
    with pytest.raises(FileNotFoundError, match=r"none/train.json does not exist: make the data first"):
        run_study(study, CODE, False, silent)
    study = make_study(detectors={"dino": BOTH["dino"] | {"settings": {"MODEL.WEIGHTS": "no.pth"}}}, settings={})
    with pytest.raises(FileNotFoundError, match=r"no.pth \(MODEL.WEIGHTS\) does not exist"):
        run_study(study, CODE, False, silent)
    assert no_training == []


def test_versions_are_not_mixed(make_study: Callable[..., Study], no_training: list[tuple[str, int]]) -> None:
    study = make_study(seeds=[1, 2])
    run_study(study, older, False, silent)
    result_file(study, study.runs()[1]).unlink()
    with pytest.raises(ValueError, match=r"1 results are of another version.*\n.*seed_1.*code was older, is now abc"):
        run_study(study, CODE, False, silent)
    assert len(no_training) == 2

    assert [result.seed for result in usable(study, False)] == [1]  # of whatever version, while there is one

    run_study(study, CODE, True, silent)
    assert len(no_training) == 4
    assert len(usable(study, False)) == 2


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ({"settings": {"SOLVER.BASE_LR": 0.5}}, "settings"),
        ({"budget": 7}, "iterations"),
        ({"data": {"shapes": {"folder": "OTHER"}}}, "data"),
    ],
)
def test_another_version_is_said(
    make_study: Callable[..., Study],
    no_training: list[tuple[str, int]],
    tmp_path: Path,
    others: dict[str, Any],
    word: str,
) -> None:
    study = make_study(seeds=[1], settings={})
    run_study(study, CODE, False, silent)
    other = tmp_path / "other"
    other.mkdir()
    for part in ("train", "test"):
        (other / f"{part}.json").write_text((tmp_path / "data" / f"{part}.json").read_text() + " ")
    others = json.loads(json.dumps(others).replace("OTHER", str(other)))
    (state,) = states(make_study(**({"seeds": [1], "settings": {}} | others)), CODE)
    assert [line.split()[0] for line in state.differences] == [word]
    assert not state.finished


def test_without_data_results_can_still_be_shown(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]], tmp_path: Path
) -> None:
    study = make_study(seeds=[1])
    run_study(study, CODE, False, silent)
    (tmp_path / "data" / "train.json").unlink()
    assert len(usable(study, False)) == 1


def test_budgets_need_a_measured_pace(make_study: Callable[..., Study], no_training: list[tuple[str, int]]) -> None:
    study = make_study(seeds=[1])
    (study.results / "pace.json").unlink()
    with pytest.raises(ValueError, match=r"seconds per step of shapes/dino are not known.*dev/study.py measure"):
        run_study(study, CODE, False, silent)
    assert "seconds per step not measured" in str(states(study, CODE)[0])


def test_a_pace_of_other_settings_does_not_count(make_study: Callable[..., Study]) -> None:
    make_study()
    paces = (read_paces(study := make_study()), study)[0]
    changed = make_study(settings=dict(study.settings) | {"INPUT.MAX_SIZE_TRAIN": 99})
    write_pace(changed, *changed.pairs()[0], paces["shapes/dino"])
    assert pace_of(changed, *changed.pairs()[0]) is None


def test_paces_of_two_processors_are_refused(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]]
) -> None:
    study = make_study(detectors=BOTH)
    pair = study.pairs()[0]
    write_pace(study, *pair, replace(pace_of(study, *pair), processor="another processor"))
    with pytest.raises(ValueError, match=r"different processors \(a processor, another processor\)"):
        run_study(study, CODE, False, silent)


def test_measuring(make_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    """On an idle machine only; with the processor's name; once."""
    monkeypatch.setattr(training, "WARM_UP", 1)
    monkeypatch.setattr(training, "TIMED", 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.2, 1.0, 1.0))
    study = make_study()
    (pair,) = study.pairs()
    with pytest.raises(ValueError, match=r"load average is 3.20"):
        measure(study, CODE, False, silent)
    assert pace_of(study, *pair).processor == "a processor"
    lines: list[str] = []
    measure(study, CODE, True, lines.append)
    pace = pace_of(study, *pair)
    assert pace.processor == schedule.processor() != "a processor"
    assert 0 < pace.seconds_per_step < 20
    assert (pace.load, pace.code) == (3.2, VERSION)
    measure(study, CODE, True, lines.append)
    assert "measured before" in lines[1]
    assert pace_of(study, *pair) == pace


def test_detectors_are_measured_in_turns(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a machine that slows down meanwhile does so for all; one that is not known is not measured by itself."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    study = make_study(detectors=BOTH)
    asked: list[tuple[str, int]] = []

    def measured(cfg: Any) -> float:
        asked.append((Path(cfg.OUTPUT_DIR).name, cfg.SEED))
        return float(len(asked))

    monkeypatch.setattr(training, "seconds_per_step", measured)
    measure(study, CODE, False, silent)
    rounds = [(name, seed) for seed in range(3) for name in BOTH]  # each with images of its own
    assert asked == rounds
    paces = {name: pace.seconds_per_step for name, pace in read_paces(study).items()}
    assert paces == {"shapes/dino": 3.0, "shapes/retinanet": 4.0}  # medians of 1, 3, 5 and of 2, 4, 6
    first = study.pairs()[0]
    write_pace(study, *first, replace(pace_of(study, *first), code="another"))
    lines: list[str] = []
    run_study(study, CODE, True, silent)
    measure(study, CODE, False, lines.append)
    assert asked == rounds * 2
    assert lines[0] == "shapes: 4 results are of other paces; run --replace does them again"


def test_several_processes_share_a_study(make_study: Callable[..., Study], no_training: list[tuple[str, int]]) -> None:
    """A run that another process does is left to it; one that another has done meanwhile is not done again."""
    study = make_study(seeds=[1, 2, 3])
    first, second, third = study.runs()
    folder_of(study, first).parent.mkdir(parents=True)
    lines: list[str] = []

    def other_process(line: str) -> None:
        lines.append(line)
        if line.startswith(str(second)):
            run_study(study, CODE, False, silent)

    with open(folder_of(study, first).with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run_study(study, CODE, False, other_process)
    assert [folder for folder, _ in no_training] == [str(folder_of(study, run)) for run in (third, second)]
    assert lines[0] == f"{first}: another process does it"
    run_study(study, CODE, False, silent)
    assert len(no_training) == 3


def test_results_of_different_versions_are_not_mixed(
    make_study: Callable[..., Study], no_training: list[tuple[str, int]]
) -> None:
    """Neither within a data set nor, for the code, between two; detectors may be of different versions."""
    study = make_study(detectors=BOTH, seeds=[1, 2])
    run_study(study, CODE, False, silent)

    def change(numbers: list[int]) -> None:
        for run in (study.runs()[number] for number in numbers):
            result = read_result(study, run)
            write_result(study, run, replace(result, version=replace(result.version, code="def")))

    change([1, 3])  # both of one detector
    assert len(usable(study, False)) == 4
    change([0])
    with pytest.raises(ValueError, match=r"must not be mixed:\n  shapes/dino/seed_2: code was abc, is now def"):
        usable(study, False)
    lines: list[str] = []
    assert len(usable(study, True, lines.append)) == 4
    assert lines == ["mixed, as asked: shapes/dino/seed_2: code was abc, is now def in the first"]


def test_a_study_of_steps_needs_no_pace(make_study: Callable[..., Study], no_training: list[tuple[str, int]]) -> None:
    study = make_study(unit="steps", seeds=[1], budget=40, evaluate_at=[10, 40])
    (study.results / "pace.json").unlink()
    lines: list[str] = []
    run_study(study, CODE, False, lines.append)
    assert [length for _, length in no_training] == [40]
    assert "1 of 1 runs finished, 0 steps left, and evaluations" in lines[-1]
    assert [x.iterations for x in read_result(study, study.runs()[0]).evaluations] == [10, 40]


def test_a_damaged_result_is_named(make_study: Callable[..., Study]) -> None:
    study = make_study()
    file = result_file(study, study.runs()[0])
    file.parent.mkdir(parents=True)
    file.write_text('{"data": "shapes"}')
    with pytest.raises(ValueError, match=r"seed_1.json is not a result .* delete it"):
        states(study, CODE)


def test_what_is_left_counts_what_was_done(make_study: Callable[..., Study]) -> None:
    study = make_study(budget=600, seeds=[1])
    (state,) = states(study, CODE)
    assert "0 of 1 runs finished, 5 minutes" in what_is_left(study, [replace(state, done=300)])
