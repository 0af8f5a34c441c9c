"""Run what is left of a study, one run after the other, and say what is left."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dino_d2.checkpoint.files import write_atomically
from dino_d2.engine.checkpoints import NUMBERED
from dino_d2.engine.run_folder import LAST

from . import training
from .plan import Run, Study, iterations_at
from .results import (
    Evaluation,
    Pace,
    Result,
    Version,
    pace_of,
    processor,
    read_paces,
    read_result,
    result_file,
    version_now,
    write_pace,
    write_result,
)

VERSION = "version.json"  # in the folder of a run: what its checkpoint is of
IDLE = 0.5  # highest load average of an idle machine

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
            return f"{self.run}: AP {last.metrics['AP']:.1f}, AP50 {last.metrics['AP50']:.1f} at {last.seconds:g} s"
        if self.seconds_per_step is None:
            return f"{self.run}: to do, seconds per step not measured"
        return f"{self.run}: {f'{self.done} of' if self.done else 'to do,'} {self.version.iterations} iterations"


def states(study: Study, code: str) -> list[State]:
    """The state of every run, with that version of the code."""
    found = []
    for run in study.runs():
        version, pace = version_now(study, run.data, run.detector, code), pace_of(study, run.data, run.detector)
        done = _iterations_done(folder_of(study, run), version)
        found.append(State(run, version, read_result(study, run), done, pace.seconds_per_step if pace else None))
    return found


def what_is_left(study: Study, found: Sequence[State]) -> str:
    """One line: the number of runs, and their time at the measured pace."""
    left = [state for state in found if not state.finished]
    seconds = sum(study.budget - state.done * (state.seconds_per_step or 0) for state in left)
    return (
        f"{study.name}: {len(found) - len(left)} of {len(found)} runs finished, "
        f"{max(seconds, 0) / 60:.0f} minutes of training left at the measured pace, and evaluations"
    )


def run_study(study: Study, code: str, replace: bool, say: Say = print) -> None:
    """Do the runs that have no result yet. A killed run is resumed, if nothing has changed that it depends on.

    Args:
        code: version of the code.
        replace: also do runs again whose results are of another version.
        say: called with lines for the user.

    Raises:
        ValueError: a pace was not measured; there are results of other versions, and `replace` is False.
        FileNotFoundError: data or weights have not been made.
        BlockingIOError: another process runs this study.
        FloatingPointError: the loss of some runs was not finite; the others are done.
    """
    found = states(study, code)
    check_paces(study, found)
    others = [state for state in found if state.differences]
    if others and not replace:
        raise ValueError(
            f"{len(others)} results are of another version, with which new ones would be mixed:\n  "
            + "\n  ".join(map(str, others))
            + "\nGo back to that version, or do them again with --replace"
        )
    left = [state for state in found if not state.finished]
    for state in left:
        study.config_of_run(state.run, state.version.iterations, folder_of(study, state.run))  # before hours of runs
    diverged = []
    with _alone(study):
        for pair, pace in read_paces(study).items():
            if pace.code != code:
                say(f"{pair}: seconds per step are of code {pace.code}; measure again if its steps cost something else")
        for state in left:
            say(f"{state.run}: {state.version.iterations} iterations of {state.seconds_per_step:.3g} s")
            try:
                _do(study, state, say)
            except FloatingPointError as error:
                say(f"  {error}")
                diverged.append(str(state.run))
            say(what_is_left(study, states(study, code)))
    if diverged:
        raise FloatingPointError(f"without a result, because the loss was not finite: {', '.join(diverged)}")


def measure(study: Study, code: str, although_busy: bool, say: Say = print) -> None:
    """Measure the seconds per step of each detector on each data set, unless they are known for this processor.

    Raises:
        ValueError: the machine is busy.
    """
    load = os.getloadavg()[0]
    if load > IDLE and not although_busy:
        raise ValueError(
            f"the load average is {load:.2f}, so steps would seem slower than they are: end other work, wait a minute "
            "and try again; --busy measures all the same"
        )
    for run in (run for run in study.runs() if run.seed == study.seeds[0]):
        pace = pace_of(study, run.data, run.detector)
        if pace and (pace.processor, pace.code) == (processor(), code):
            say(f"{run.data.name}/{run.detector.name}: {pace.seconds_per_step:.4g} s per step, measured before")
            continue
        folder = study.work / study.name / "measure" / run.data.name / run.detector.name
        shutil.rmtree(folder, ignore_errors=True)
        cfg = study.config_of_run(run, training.WARM_UP + training.TIMED, folder)
        seconds = training.seconds_per_step(cfg)
        digest = study.cost_digest(run.data, run.detector)
        versions = {"code": code, "torch": torch.__version__, "settings": digest}
        threads = torch.get_num_threads()
        write_pace(study, run.data, run.detector, Pace(seconds, processor(), threads, round(load, 2), **versions))
        say(f"{run.data.name}/{run.detector.name}: {seconds:.4g} s per step")


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


def usable(study: Study, code: str, any_version: bool, say: Say = print) -> list[Result]:
    """The results for tables and plots: those of this version, or all; what is left out or mixed is said."""
    found = [state for state in states(study, code) if state.result]
    others = [state for state in found if state.differences]
    if others:
        what = "with other versions mixed in, as asked" if any_version else "left out (--any-version takes them in)"
        say(f"{len(others)} of {len(found)} results are of another version, {what}:")
        for state in others:
            say(f"  {state}")
    return [state.result for state in found if any_version or state not in others]


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


@contextmanager
def _alone(study: Study) -> Iterator[None]:
    """Keep other processes from the same study; the lock ends with the process, however it ends."""
    folder = study.work / study.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process is running {study.name} (it holds {folder / 'lock'})") from error
        yield
