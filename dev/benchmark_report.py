"""Results of dev/benchmark.py: dataclasses, and output as JSON, Markdown and plots."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dino_d2.ops import compiled

MIXED = "mixed"  # image shapes differ within a batch


@dataclass(frozen=True)
class Case:
    """A timed case, which is also the key for comparing two runs.

    variant: name of `overrides`, the KEY VALUE … that change the config. mode: infer or train. shape: of the images,
    HEIGHTxWIDTH or mixed. objects: per image.
    """

    variant: str
    overrides: str
    mode: str
    dtype: str
    batch: int
    shape: str
    objects: int

    @property
    def work(self) -> str:
        """The part that variants have in common."""
        objects = f", {self.objects} objects per image" if self.mode == "train" else ""
        return f"{self.mode}, {self.dtype}, {self.batch} x {self.shape}{objects}"

    def __str__(self) -> str:
        return f"{self.variant}: {self.work}" + (f" ({self.overrides})" if self.overrides else "")


@dataclass(frozen=True)
class Seconds:
    """Median and 90th percentile."""

    median: float
    p90: float


@dataclass(frozen=True)
class Measurement:
    """Measurements of a case. stages: in execution order, timed separately; empty if not available. end_to_end: of
    uninterrupted calls. peak_memory: bytes; None if not available."""

    case: Case
    stages: dict[str, Seconds]
    end_to_end: Seconds
    images_per_second: float
    peak_memory: int | None


@dataclass(frozen=True)
class Report:
    """Results of a run. machine: see `describe_machine`. config: name of the file, and KEY VALUE … for all cases."""

    machine: str
    config: str
    rounds: int
    measurements: list[Measurement]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """
        Raises:
            ValueError: the file was not written by :meth:`write`.
        """
        try:
            values = json.loads(path.read_text())
            values["measurements"] = [_measurement(x) for x in values["measurements"]]
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} was not written by dev/benchmark.py --json: {error}") from error


def _measurement(values: dict) -> Measurement:
    stages = {stage: Seconds(**seconds) for stage, seconds in values.pop("stages").items()}
    case, end_to_end = Case(**values.pop("case")), Seconds(**values.pop("end_to_end"))
    return Measurement(case=case, stages=stages, end_to_end=end_to_end, **values)


def describe_machine(device: torch.device) -> str:
    """Processor, cores, threads, instruction sets of PyTorch and of the op, accelerator, version of PyTorch."""
    parts = [
        _processor(),
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
        "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads",
        f"PyTorch for {torch.backends.cpu.get_cpu_capability()}",
        f"op for {torch.ops.dino_d2.cpu_kernels()}" if compiled("cpu") else "op not compiled",
    ]
    if device.type != "cpu":
        parts.insert(0, torch.get_device_module(device).get_device_name(device))
    return ", ".join([*parts, f"torch {torch.__version__}"])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [x.partition(":")[2].strip() for x in _lines(cpuinfo) if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def as_markdown(report: Report) -> str:
    """One line per case; then the stages of all variants with the same work, side by side."""
    first = report.measurements[0]
    lines = [
        f"{report.config}; {report.machine}; {report.rounds} rounds, interleaved. Ratio: time per image vs first line",
        "",
        "| | median (ms) | 90 % (ms) | images/s | peak memory (GiB) | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    works: dict[str, dict[str, Measurement]] = {}
    for m in report.measurements:
        works.setdefault(m.case.work, {})[m.case.variant] = m
        seconds, memory = m.end_to_end, "" if m.peak_memory is None else f"{m.peak_memory / 2**30:.2f}"
        ratio = first.images_per_second / m.images_per_second
        numbers = (f"{seconds.median * 1e3:.1f}", f"{seconds.p90 * 1e3:.1f}", f"{m.images_per_second:.2f}", memory)
        lines.append(f"| {m.case.variant}: {m.case.work} | {' | '.join(numbers)} | {ratio:.2f} |")
    for work, variants in works.items():
        lines += ["", f"{work}:", "", side_by_side(variants)]
    return "\n".join(lines)


def side_by_side(columns: Mapping[str, Measurement]) -> str:
    """The stages of several measurements as columns, with ratios to the first; above 1 is slower, or more."""
    tables = [_rows(m) for m in columns.values()]
    first, *others = columns
    header = ["", f"{first} (ms)", "90 %", "share", *(x for name in others for x in (f"{name} (ms)", "90 %", "ratio"))]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    whole = sum(seconds.median for seconds in columns[first].stages.values()) * 1e3
    for name in dict.fromkeys(name for table in tables for name in table):
        base = tables[0].get(name)
        cells = []
        for number, table in enumerate(tables):
            if name not in table:
                cells += ["", "", ""]
                continue
            value, p90 = table[name]
            if number == 0:
                last = f"{value / whole:.0%}" if name in columns[first].stages else ""
            else:
                last = f"{value / base[0]:.2f}" if base and base[0] else ""
            cells += [f"{value:.2f}", "" if p90 is None else f"{p90:.2f}", last]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(m: Measurement) -> dict[str, tuple[float, float | None]]:
    """Median and 90th percentile; times in milliseconds."""
    times = {**m.stages, "end to end": m.end_to_end}
    rows: dict[str, tuple[float, float | None]] = {
        name: (seconds.median * 1e3, seconds.p90 * 1e3) for name, seconds in times.items()
    }
    rows["images per second"] = (m.images_per_second, None)
    if m.peak_memory is not None:
        rows["peak memory (GiB)"] = (m.peak_memory / 2**30, None)
    return rows


def compare(paths: Sequence[Path]) -> str:
    """Compare two reports case by case, and list cases that only one of them has.

    Raises:
        ValueError: a file is not a report, or there are no common cases.
    """
    reports = dict(zip("AB", map(Report.read, paths), strict=True))
    of_case = [{m.case: m for m in report.measurements} for report in reports.values()]
    common = [case for case in of_case[0] if case in of_case[1]]
    if not common:
        raise ValueError(
            f"{paths[0]} and {paths[1]} have no cases in common: {next(iter(of_case[0]))} is only in the first"
        )
    lines = [f"- {name}: {r.config}; {r.machine}; {r.rounds} rounds" for name, r in reports.items()]
    for case in common:
        lines += ["", f"{case}:", "", side_by_side({"A": of_case[0][case], "B": of_case[1][case]})]
    for name, mine, other in (("A", *of_case), ("B", *reversed(of_case))):
        lines += [f"\nOnly in {name}: {case}" for case in mine if case not in other]
    return "\n".join(lines)


def draw(curves: Mapping[str, Mapping[float, Measurement]], title: str, path: Path) -> None:
    """Plot stacked stages, one panel per axis. `curves`: axis label -> x -> measurement."""
    import matplotlib  # imported late: only needed for plots

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(name for curve in curves.values() for m in curve.values() for name in m.stages))
    colours = plt.get_cmap("tab20")(range(len(stages)))
    figure, axes = plt.subplots(
        1, len(curves), figsize=(3.2 * len(curves) + 1.6, 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (label, curve) in zip(axes.flat, curves.items(), strict=True):
        points = sorted(curve.items())
        x = [value for value, _ in points]
        heights = [[m.stages[stage].median / m.case.batch for _, m in points] for stage in stages]
        areas = axis.stackplot(x, heights, colors=colours)
        (line,) = axis.plot(x, [1 / m.images_per_second for _, m in points], "k.--", lw=1)
        axis.set_xlabel(label)
        axis.set_xlim(0, max(x))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds per image, median")
    axes[0, 0].set_ylim(bottom=0)  # shared by all
    figure.legend([line, *reversed(areas)], ["end to end", *reversed(stages)], loc="outside right", frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
