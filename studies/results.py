"""Results of a study: one JSON file per run, the version that each is of, and what their table shows."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from dino_d2.checkpoint.files import write_atomically

from .peers import is_peer
from .plan import STEPS, Candidate, DataSet, Run, Study, iterations_at
from .training import NMS, Metrics

ROOT = Path(__file__).resolve().parent.parent
# What results depend on, as git's pathspecs. Configs do not count, since their values do.
CODE = ("dino_d2", "ops", "studies/training.py", "studies/peers.py")
NOT_IN_A_RUN = (
    *("app.py", "deploy", "detections.py", "detector.py", "engine/choices.py"),
    *("model_zoo", "pretrained.py", "report", "tiles.py"),
)
OF_DINO = (":(exclude,glob)dino_d2/modeling/*.py", ":(exclude)dino_d2/modeling/family", ":(exclude)dino_d2/meta_arch")
OF_PEERS = (":(exclude)studies/peers.py",)
PACE = "pace.json"
DROPPED = f"_{NMS}"  # ends the names of metrics with duplicates dropped
CodeOf = Callable[[Study, DataSet, Candidate], str]  # `code_of`
LEAST = "–"  # for a deviation of fewer than two values


@dataclass(frozen=True)
class Version:
    """What a result depends on. None: not known here, for want of the data or of a measured pace.

    code: commit of the files that it depends on. torch: version. settings: digest. data: digest of the annotations.
    iterations: of the run, which follow from the budget and the pace."""

    code: str
    torch: str
    settings: str
    data: str | None
    iterations: int | None

    def of_code(self) -> Version:
        """What the results of a detector on different data sets have in common."""
        return replace(self, settings="", data=None, iterations=None)

    def differences(self, now: Version) -> list[str]:
        """What differs from `now`, in words; empty if the results may stand side by side."""
        pairs = [(field.name, getattr(self, field.name), getattr(now, field.name)) for field in fields(self)]
        known = [pair for pair in pairs if pair[2] is not None]
        return [f"{name} was {then}, is now {today}" for name, then, today in known if then != today]


@dataclass(frozen=True)
class Pace:
    """Seconds per step of a detector on a data set, measured alone.

    processor, threads: of that machine. load: its load average before. code, torch: versions. settings: digest of
    those that a step's time may depend on."""

    seconds_per_step: float
    processor: str
    threads: int
    load: float
    code: str
    torch: str
    settings: str


@dataclass(frozen=True)
class Evaluation:
    """at: in the unit of the study: seconds of training on the measured machine, or steps. iterations: done by then.
    metrics: AP in percent."""

    at: float
    iterations: int
    metrics: Metrics


@dataclass(frozen=True)
class Result:
    """A finished run. seconds_per_step, measured_on: the pace that its length follows from."""

    data: str
    detector: str
    seed: int
    version: Version
    seconds_per_step: float
    measured_on: str
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        return f"{self.data}/{self.detector}/seed_{self.seed}"

    def metric(self, name: str, moment: float) -> float | None:
        """A metric of the evaluation at that moment; None if there was none, or if it has no such metric.

        A detector that always drops duplicates has no second evaluation that does so: AP_nms is its AP.
        """
        metrics = next((x.metrics for x in self.evaluations if x.at == moment), {})
        if not any(known.endswith(DROPPED) for known in metrics):
            name = name.removesuffix(DROPPED)
        return metrics.get(name)


STEP = Pace(1.0, "", 0, 0.0, "", "", "")


def result_file(study: Study, run: Run) -> Path:
    return study.results / f"{run}.json"


def read_result(study: Study, run: Run) -> Result | None:
    """The result of a run; None if it is not finished.

    Raises:
        ValueError: the file is damaged.
    """
    file = result_file(study, run)
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        evaluations = tuple(Evaluation(**entry) for entry in content.pop("evaluations"))
        return Result(version=Version(**content.pop("version")), evaluations=evaluations, **content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a result of a study ({error!r}): delete it to run it again") from error


def write_result(study: Study, run: Run, result: Result) -> None:
    _write_json(result_file(study, run), asdict(result))


def read_paces(study: Study) -> dict[str, Pace]:
    """The measured paces of the study by "data/detector"."""
    file = study.results / PACE
    return {name: Pace(**entry) for name, entry in json.loads(file.read_text()).items()} if file.is_file() else {}


def write_pace(study: Study, data: DataSet, detector: Candidate, pace: Pace) -> None:
    found = read_paces(study) | {f"{data.name}/{detector.name}": pace}
    _write_json(study.results / PACE, {name: asdict(entry) for name, entry in sorted(found.items())})


def pace_of(study: Study, data: DataSet, detector: Candidate) -> Pace | None:
    """The measured pace; None if it was not measured, or with settings by which a step may cost something else. In a
    study whose unit is steps, one step takes 1."""
    if study.unit == STEPS:
        return STEP
    pace = read_paces(study).get(f"{data.name}/{detector.name}")
    return pace if pace and pace.settings == study.cost_digest(data, detector) else None


def version_now(study: Study, data: DataSet, detector: Candidate, code: CodeOf) -> Version:
    """The version of a result of this pair if it ran now, with the code of that version."""
    pace = pace_of(study, data, detector)
    return Version(
        code(study, data, detector),
        torch.__version__,
        study.settings_digest(data, detector),
        _digest_of_data(data),
        iterations_at(study.budget, pace.seconds_per_step) if pace else None,
    )


def code_of(study: Study, data: DataSet, detector: Candidate) -> str:
    """The version of the code that results of this pair depend on."""
    of_others = OF_DINO if is_peer(study.config(data, detector)) else OF_PEERS
    return code_version(ROOT, (*CODE, *(f":(exclude)dino_d2/{name}" for name in NOT_IN_A_RUN), *of_others))


def code_version(root: Path, paths: Sequence[str]) -> str:
    """The last commit that changed any of the paths (git's pathspecs); with a digest of what has changed since, if
    anything has.

    Raises:
        ValueError: not a checkout.
    """
    commit = _git(root, "log", "-1", "--format=%h", "--abbrev=12", "--", *paths).strip()
    if not commit:
        raise ValueError(f"{root} has no commit of {', '.join(paths)}: studies run in a checkout of the repository")
    changed = _git(root, "diff", "HEAD", "--", *paths)
    added = _git(root, "ls-files", "--others", "--exclude-standard", "--", *paths).split()
    changed += "".join(f"{name}\n{(root / name).read_bytes().hex()}" for name in added)
    return f"{commit}+{hashlib.sha256(changed.encode()).hexdigest()[:8]}" if changed else commit


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def by_seed(results: Sequence[Result], metric: str, moment: float) -> dict[int, float]:
    """The values of a metric at that moment, of the seeds that have it."""
    values = {x.seed: x.metric(metric, moment) for x in results}
    return {seed: value for seed, value in values.items() if value is not None}


def mean_and_deviation(values: Sequence[float], decimals: int = 1) -> str:
    """Mean and standard deviation of a sample (n - 1)."""
    deviation = f"{statistics.stdev(values):.{decimals}f}" if len(values) > 1 else LEAST
    return f"{statistics.fmean(values):.{decimals}f} ± {deviation}"


def table(study: Study, results: Sequence[Result]) -> str:
    """Markdown: for each data set, detector and moment the mean, standard deviation and every seed of each metric.
    Detectors without results are left out."""
    rows = []
    for data, detector in study.pairs():
        own = [x for x in results if (x.data, x.detector) == (data.name, detector.name)]
        for moment in study.evaluate_at if own else ():
            row: list[Any] = [data.name, detector.name, f"{moment:g}"]
            for name in study.metrics:
                values = by_seed(own, name, moment)
                decimals = 1 if name.startswith("AP") else 3
                each = [f"{values[seed]:.{decimals}f}" if seed in values else LEAST for seed in study.seeds]
                row += [
                    mean_and_deviation(list(values.values()), decimals) if values else LEAST,
                    ", ".join(each),
                ]
            rows.append(row)
    seeds = f"seeds {', '.join(map(str, study.seeds))}"
    headers = ["data", "detector", study.unit, *(part for name in study.metrics for part in (name, seeds))]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def _digest_of_data(data: DataSet) -> str | None:
    files = [data.folder / f"{part}.json" for part in (data.train, data.test)]
    if not all(file.is_file() for file in files):
        return None
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {arguments[0]} failed in {root}, which must be a checkout: {done.stderr.strip()}")
    return done.stdout


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(str(file.parent), file.name, lambda out: out.write(text.encode()))
