"""Run what is left of a study, one run after the other, and say what is left."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dino_d2.checkpoint.files import write_atomically
from dino_d2.engine.checkpoints import NUMBERED
from dino_d2.engine.run_folder import LAST

from . import training
from .plan import SECONDS, STEPS, Candidate, DataSet, Run, Study, iterations_at
from .results import (
    CodeOf,
    Evaluation,
    Pace,
    Result,
    Version,
    pace_of,
    processor,
    read_result,
    result_file,
    version_now,
    write_pace,
    write_result,
)

VERSION = "version.json"  # in the folder of a run: what its checkpoint is of
IDLE = 0.5  # highest load average of an idle machine
ROUNDS = 3  # in which each detector of a data set is timed once

Say = Callable[[str], None]


@dataclass(frozen=True)
class State:
    """How far a run is.

    version: that a result would have now. result: of a finished run, of whatever version. done: iterations of an
    unfinished run that will be resumed. seconds_per_step: None if it was not measured."""

    run: Run
    version: Version
    result: Result | None
    done: int
    seconds_per_step: float | None

    @property
    def differences(self) -> list[str]:
        """Why the result is of another version; empty if it is not, or if there is none."""
        return self.result.version.differences(self.version) if self.result else []

    @property
    def finished(self) -> bool:
        return self.result is not None and not self.differences

    def __str__(self) -> str:
        if self.differences:
            return f"{self.run}: another version: {'; '.join(self.differences)}"
        if self.result:
            last = self.result.evaluations[-1]
            return f"{self.run}: AP {last.metrics['AP']:.1f}, AP50 {last.metrics['AP50']:.1f} at {last.at:g}"
        if self.seconds_per_step is None:
            return f"{self.run}: to do, seconds per step not measured"
        return f"{self.run}: {f'{self.done} of' if self.done else 'to do,'} {self.version.iterations} iterations"


def states(study: Study, code: CodeOf) -> list[State]:
    """The state of every run, with the code of that version."""
    found = []
    for run in study.runs():
        version, pace = version_now(study, run.data, run.detector, code), pace_of(study, run.data, run.detector)
        done = _iterations_done(folder_of(study, run), version)
        found.append(State(run, version, read_result(study, run), done, pace.seconds_per_step if pace else None))
    return found


def what_is_left(study: Study, found: Sequence[State]) -> str:
    """One line: the number of runs, and their time at the measured pace."""
    left = [state for state in found if not state.finished]
    amount = max(sum(study.budget - state.done * (state.seconds_per_step or 0) for state in left), 0)
    how_long = f"{amount:.0f} steps" if study.unit == STEPS else f"{amount / 60:.0f} minutes of training"
    at_pace = "" if study.unit == STEPS else " at the measured pace"
    return (
        f"{study.name}: {len(found) - len(left)} of {len(found)} runs finished, {how_long} left{at_pace}, and "
        "evaluations"
    )


def run_study(study: Study, code: CodeOf, again: bool, say: Say = print) -> None:
    """Do the runs that have no result yet and that no other process does: several may share the work.

    A killed run is resumed, if nothing has changed that it depends on.

    Args:
        code: version of the code of a pair.
        again: also do runs whose results are of another version.
        say: called with lines for the user.

    Raises:
        ValueError: a pace was not measured; there are results of other versions, and `again` is False.
        FileNotFoundError: data or weights have not been made.
        FloatingPointError: the loss of some runs was not finite; the others are done.
    """
    found = states(study, code)
    check_paces(study, found)
    others = [state for state in found if state.differences]
    if others and not again:
        raise ValueError(
            f"{len(others)} results are of another version, with which new ones would be mixed:\n  "
            + "\n  ".join(map(str, others))
            + "\nGo back to that version, or do them again with --replace"
        )
    left = [state for state in found if not state.finished]
    for state in left:
        study.config_of_run(state.run, state.version.iterations, folder_of(study, state.run))  # before hours of runs
    for state in left:
        pace, now = pace_of(study, state.run.data, state.run.detector), state.version.code
        if study.unit == SECONDS and pace.code != now:
            say(
                f"{state.run}: seconds per step are of code {pace.code}; measure again if steps cost something else now"
            )
    diverged = []
    for state in left:
        with _alone(study, state.run) as alone:
            if not alone:
                say(f"{state.run}: another process does it")
                continue
            if _result_now(study, state):  # meanwhile, by another process
                continue
            say(f"{state.run}: {state.version.iterations} iterations of {state.seconds_per_step:.3g} s")
            try:
                _do(study, state, say)
            except FloatingPointError as error:
                say(f"  {error}")
                diverged.append(str(state.run))
        say(what_is_left(study, states(study, code)))
    if diverged:
        raise FloatingPointError(f"without a result, because the loss was not finite: {', '.join(diverged)}")


def measure(study: Study, code: CodeOf, although_busy: bool, say: Say = print) -> None:
    """Measure the seconds per step of all detectors on each data set, unless all are known for this processor.

    The detectors take turns, and the median of `ROUNDS` counts: the speed of a machine may wander, and what is compared
    must have been measured in the same minutes. Each round has images of its own. Results of other paces are of another
    version.

    Raises:
        ValueError: the machine is busy.
    """
    load = os.getloadavg()[0]
    if load > IDLE and not although_busy:
        raise ValueError(
            f"the load average is {load:.2f}, so steps would seem slower than they are: end other work, wait a minute "
            "and try again; --busy measures all the same"
        )
    for data in study.data:
        if all(_is_known(study, data, detector, code) for detector in study.detectors):
            say(f"{data.name}: measured before")
            continue
        old = [run for run in study.runs() if run.data == data and read_result(study, run)]
        if old:
            say(f"{data.name}: {len(old)} results are of other paces; run --replace does them again")
        rounds = [[_seconds_per_step(study, Run(data, x, seed)) for x in study.detectors] for seed in range(ROUNDS)]
        for detector, seconds in zip(study.detectors, zip(*rounds, strict=True), strict=True):
            digest = study.cost_digest(data, detector)
            versions = {"code": code(study, data, detector), "torch": torch.__version__, "settings": digest}
            pace = Pace(statistics.median(seconds), processor(), torch.get_num_threads(), round(load, 2), **versions)
            write_pace(study, data, detector, pace)
            each = ", ".join(f"{second:.4g}" for second in seconds)
            say(f"{data.name}/{detector.name}: {pace.seconds_per_step:.4g} s per step (median of {each})")


def _is_known(study: Study, data: DataSet, detector: Candidate, code: CodeOf) -> bool:
    pace = pace_of(study, data, detector)
    return pace is not None and (pace.processor, pace.code) == (processor(), code(study, data, detector))


def _seconds_per_step(study: Study, run: Run) -> float:
    folder = study.work / study.name / "measure" / run.data.name / run.detector.name
    shutil.rmtree(folder, ignore_errors=True)
    return training.seconds_per_step(study.config_of_run(run, training.WARM_UP + training.TIMED, folder))


def check_paces(study: Study, found: Sequence[State]) -> None:
    """
    Raises:
        ValueError: a pace was not measured, or they are of different processors.
    """
    missing = sorted({f"{x.run.data.name}/{x.run.detector.name}" for x in found if x.seconds_per_step is None})
    if missing:
        raise ValueError(
            f"the seconds per step of {', '.join(missing)} are not known for these settings: on an idle machine, run "
            f"dev/study.py measure {study.file}"
        )
    measured = {pace_of(study, x.run.data, x.run.detector).processor for x in found}
    if len(measured) > 1:
        raise ValueError(
            f"the seconds per step were measured on different processors ({', '.join(sorted(measured))}), so budgets "
            f"are not comparable: on one idle machine, run dev/study.py measure {study.file}"
        )


def usable(study: Study, any_version: bool, say: Say = print) -> list[Result]:
    """The results for tables and plots, of whatever version, if they may stand side by side.

    Raises:
        ValueError: those of one detector are of different versions, and `any_version` is False.
    """
    found = [result for run in study.runs() if (result := read_result(study, run))]
    lines = []
    for result in found:
        of_detector = [x for x in found if x.detector == result.detector]
        of_pair = [x for x in of_detector if x.data == result.data]
        differences = result.version.of_code().differences(of_detector[0].version.of_code())
        differences = differences or result.version.differences(of_pair[0].version)
        if differences:
            lines.append(f"{result.name}: {'; '.join(differences)} in the first")
    if lines and not any_version:
        raise ValueError(
            f"{study.file}: results of different versions must not be mixed:\n  "
            + "\n  ".join(lines)
            + "\nDo some of them again with run --replace, or mix them with --any-version"
        )
    for line in lines:
        say(f"mixed, as asked: {line}")
    return found


def folder_of(study: Study, run: Run) -> Path:
    """Folder for checkpoint, log and weights of a run."""
    return study.work / study.name / str(run)


def _do(study: Study, state: State, say: Say) -> None:
    run, version = state.run, state.version
    folder = folder_of(study, run)
    if not state.done:  # also what is left of another version
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, version)
    else:
        say(f"  resuming after {state.done} iterations")
    moments = {seconds: iterations_at(seconds, state.seconds_per_step) for seconds in study.evaluate_at}
    cfg = study.config_of_run(run, version.iterations, folder)
    found = training.train(
        cfg,
        sorted({*moments.values()}),
        lambda done, metrics: say(f"  {done} iterations: AP {metrics['AP']:.1f}, AP50 {metrics['AP50']:.1f}"),
    )
    evaluations = tuple(Evaluation(seconds, done, found[done]) for seconds, done in moments.items())
    pace = pace_of(study, run.data, run.detector)
    names = run.data.name, run.detector.name, run.seed
    write_result(study, run, Result(*names, version, pace.seconds_per_step, pace.processor, evaluations))
    training.keep_weights(folder)
    say(f"  {result_file(study, run)}")


def _iterations_done(folder: Path, version: Version) -> int:
    """Iterations of the newest checkpoint of an unfinished run of the same version; 0 without one."""
    file, last = folder / VERSION, folder / LAST
    if not (file.is_file() and last.is_file()) or Version(**json.loads(file.read_text())) != version:
        return 0
    numbered = NUMBERED.fullmatch(last.read_text())
    return int(numbered[1]) + 1 if numbered else version.iterations


def _write(folder: Path, version: Version) -> None:
    text = json.dumps(asdict(version))
    write_atomically(str(folder), VERSION, lambda file: file.write(text.encode()))


def _result_now(study: Study, state: State) -> bool:
    result = read_result(study, state.run)
    return result is not None and not result.version.differences(state.version)


@contextmanager
def _alone(study: Study, run: Run) -> Iterator[bool]:
    """Whether no other process does this run; none will, meanwhile. The lock ends with the process, however it ends."""
    file = folder_of(study, run).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
