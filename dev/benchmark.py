#!/usr/bin/env python3
"""Time inference or a training step, stage by stage: Markdown on the console, JSON in a file.

    dev/benchmark.py --config-file configs/dino_r50_4scale_12ep.yaml --variant reference MODEL.DINO.OP reference
    dev/benchmark.py --config-file CONFIG --mode train --mixed --batch 1 2 --dtype float32 bfloat16 --json new.json
    dev/benchmark.py --config-file CONFIG --size 480 640 --growth size queries layers batch --plot growth.png
    dev/benchmark.py --compare old.json new.json

Every variant is timed with every dtype and batch size, interleaved, so that other load affects all of them alike.
Weights and pixels are random. docs/performance.md explains the numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch.profiler import ProfilerActivity, profile

from benchmark_report import MIXED, Case, Measurement, Report, Seconds, as_markdown, compare, describe_machine, draw
from benchmark_runners import (
    ExportedInference,
    Runner,
    RunnerFactory,
    in_onnxruntime,
    in_openvino,
    make_batch,
    wait_for,
)
from dino_d2.autocast import DTYPES

BASE = "dino_d2"  # the config without changes
SET_BY_OPTION = {
    "MODEL.DEVICE": "--device",
    **{f"{part}.AMP.{key}": "--dtype" for part in ("SOLVER", "TEST") for key in ("ENABLED", "DTYPE")},
}
GROWTH = {  # axis -> factors applied to the first case
    "size": (0.5, 0.75, 1),  # each side
    "queries": (1 / 3, 2 / 3, 1),
    "layers": (1 / 3, 2 / 3, 1),  # of the encoder, and of the decoder
    "objects": (1, 5, 10, 25),
    "batch": (1, 2, 4),
}
AXIS_LABELS = {
    "size": "image size (million pixels)",
    "queries": "queries",
    "layers": "encoder and decoder layers",
    "objects": "objects per image",
    "batch": "images per batch",
}


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def peak_of(call: Callable[[], None], device: torch.device) -> int | None:
    """Peak memory of `call` in bytes above the level before: allocated on a GPU, resident on a CPU.

    None if a CPU's peak cannot be reset (other than Linux with glibc).
    """
    if device.type != "cpu":
        memory = torch.get_device_module(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        call()
        return memory.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # resident but freed memory would be reused unnoticed
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        call()
        return None
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(runners: dict[Case, Runner], rounds: int, device: torch.device) -> list[Measurement]:
    """Warm up with two calls of each, the second to measure memory; then time `rounds` interleaved rounds."""
    memory = {}
    for case, runner in runners.items():
        runner.call()
        peak = peak_of(runner.call, device)
        own = runner.own_memory()
        memory[case] = None if own is None or peak is None else own + peak
    staged: dict[Case, list[dict[str, float]]] = {case: [] for case in runners}
    whole: dict[Case, list[float]] = {case: [] for case in runners}
    for _ in range(rounds):
        for case, runner in runners.items():
            if len(runners) > 1:
                runner.call()  # so that the caches do not hold another runner's data
            staged[case].append(runner.stages())
            whole[case].append(seconds_of(runner.call, device))
    return [
        Measurement(
            case=case,
            stages={name: summary([x[name] for x in staged[case]]) for name in staged[case][0]},
            end_to_end=summary(whole[case]),
            images_per_second=case.batch / statistics.median(whole[case]),
            peak_memory=memory[case],
        )
        for case in runners
    ]


def summary(seconds: Sequence[float]) -> Seconds:
    return Seconds(*map(float, np.percentile(seconds, (50, 90))))


def operators(call: Callable[[], None], device: torch.device) -> str:
    """The operators of one call, sorted by time."""
    on_accelerator = device.type != "cpu"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_accelerator else [])
    with profile(activities=activities) as profiled:
        call()
        wait_for(device)
    order = "self_device_time_total" if on_accelerator else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)


def grown(cfg: CfgNode, base: Case, axis: str) -> dict[float, Case]:
    """The cases along an axis by their position; `base` is one of them."""
    return dict(_grown_by(cfg, base, axis, factor) for factor in GROWTH[axis])


def _grown_by(cfg: CfgNode, base: Case, axis: str, factor: float) -> tuple[float, Case]:
    if axis == "size":
        height, width = (max(1, round(int(side) * factor)) for side in base.shape.split("x"))
        return height * width / 1e6, replace(base, shape=f"{height}x{width}")
    if axis in ("batch", "objects"):
        count = getattr(base, axis) * factor
        return count, replace(base, **{axis: count})
    c = cfg.MODEL.DINO
    if axis == "queries":
        count = max(1, round(c.NUM_QUERIES * factor))
        overrides = f"MODEL.DINO.NUM_QUERIES {count}"
    else:
        encoder, decoder = (max(1, round(layers * factor)) for layers in (c.ENC_LAYERS, c.DEC_LAYERS))
        count, overrides = encoder + decoder, f"MODEL.DINO.ENC_LAYERS {encoder} MODEL.DINO.DEC_LAYERS {decoder}"
    return count, base if factor == 1 else replace(base, variant=f"{count} {axis}", overrides=overrides)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a positive integer (put config KEY VALUEs right after --config-file FILE)"
        )
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --config-file FILE [KEY VALUE ...] [options]\n       %(prog)s --compare A.json B.json",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config values for all cases")
    parser.add_argument("--mode", choices=("infer", "train"), default="infer", help="default infer")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--size",
        type=positive,
        nargs=2,
        default=(800, 1333),
        metavar=("HEIGHT", "WIDTH"),
        help="of each image (default 800 1333)",
    )
    shape.add_argument(
        "--mixed", action="store_true", help="COCO image shapes at the config's test size, padded to a batch"
    )
    parser.add_argument("--batch", type=positive, nargs="+", default=[1], help="batch sizes (default 1)")
    parser.add_argument("--objects", type=int, default=8, help="in each image, for training (default 8)")
    parser.add_argument("--dtype", nargs="+", choices=("float32", *DTYPES), default=["float32"], help="autocast dtypes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--variant", nargs=3, action="append", default=[], metavar=("NAME", "KEY", "VALUE"),
        help="also time the config with this change; repeat a NAME to change more keys",
    )  # fmt: skip
    parser.add_argument(
        "--onnx",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="exported models to time too, in onnxruntime (first dtype)",
    )
    parser.add_argument(
        "--openvino", type=Path, nargs="+", default=[], metavar="FILE", help="the same in OpenVINO, on a CPU"
    )
    parser.add_argument(
        "--growth", nargs="+", choices=GROWTH, metavar="AXIS", help=f"how cost grows: {', '.join(GROWTH)}"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot of the growth")
    parser.add_argument("--rounds", type=positive, default=10, help="timed calls of each (default 10)")
    parser.add_argument("--profile", action="store_true", help="also list the operators of the first case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="compare two results instead"
    )
    args = parser.parse_args(arguments)
    if args.compare:
        return args

    if not args.config_file:
        parser.error("give --config-file FILE (or --compare A.json B.json)")
    if args.device != "cpu" and not torch.accelerator.is_available():
        parser.error(f"--device {args.device} is not available; use --device cpu")
    if len(args.opts) % 2:
        parser.error(f"config KEY VALUE …: {args.opts[-1]} has no value")
    if args.objects < 0:
        parser.error(f"--objects {args.objects}: must be at least 0")
    keys = [*args.opts[::2], *(key for _, key, _ in args.variant)]
    for key in keys:
        if key in SET_BY_OPTION:
            parser.error(f"{key}: use {SET_BY_OPTION[key]} instead")
    exported = [path.name for path in args.onnx] + [name_in_openvino(path) for path in args.openvino]
    names = [BASE, *{name for name, _, _ in args.variant}, *exported]
    if len(set(names)) < len(names):
        parser.error(f"--variant, --onnx, --openvino: names must be unique; {BASE} is the unchanged config")
    if exported and args.mode == "train":
        parser.error("--onnx, --openvino: exported models cannot be trained; use --mode infer")
    if bool(args.growth) != bool(args.plot):
        parser.error("--growth AXIS … and --plot PNG must be given together")
    if args.growth and (args.mixed or args.variant or exported or len(args.batch) > 1 or len(args.dtype) > 1):
        parser.error(
            "--growth starts from one case: one --size, one --batch, one --dtype, no --variant or exported model"
        )
    if args.growth and "objects" in args.growth and (args.mode == "infer" or args.objects == 0):
        parser.error("--growth objects needs --mode train and --objects of at least 1")
    if not Path(args.config_file).is_file():
        parser.error(f"--config-file {args.config_file} does not exist")
    return args


def name_in_openvino(path: Path) -> str:
    return f"{path.name} in OpenVINO"


def cases_of(args: argparse.Namespace) -> list[Case]:
    variants = {BASE: ""}
    for name, key, value in args.variant:
        variants[name] = f"{variants.get(name, '')} {shlex.join([key, value])}".strip()
    shape = MIXED if args.mixed else "{}x{}".format(*args.size)
    objects = args.objects if args.mode == "train" else 0
    return [
        Case(variant, overrides, args.mode, dtype, batch, shape, objects)
        for dtype in args.dtype
        for batch in args.batch
        for variant, overrides in variants.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark. `arguments`: the command line; None: that of the process."""
    args = parse(arguments)
    if args.compare:
        print(compare(args.compare))
        return
    for path in (args.json, args.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)  # fail early
    device = torch.device(args.device)
    factory = RunnerFactory(args.config_file, args.opts, device)
    cases = cases_of(args)
    axes = {axis: grown(factory.config(), cases[0], axis) for axis in args.growth or ()}
    cases = list(dict.fromkeys([*cases, *(case for axis in axes.values() for case in axis.values())]))
    runners: dict[Case, Runner] = {case: factory.runner(case) for case in cases}
    exported = {path.name: in_onnxruntime(path, device) for path in args.onnx}
    exported |= {name_in_openvino(path): in_openvino(path, device) for path in args.openvino}
    for name, model in exported.items():
        for batch in args.batch:
            case = replace(cases[0], variant=name, batch=batch)
            runners[case] = ExportedInference(model, make_batch(factory.config(), case))
    config = " ".join([Path(args.config_file).name, *args.opts])
    report = Report(describe_machine(device), config, args.rounds, measure(runners, args.rounds, device))
    print(as_markdown(report))
    if args.profile:
        print(f"\n```\n{operators(runners[cases[0]].call, device)}\n```")
    if args.json:
        report.write(args.json)
    if args.plot:
        measured = {m.case: m for m in report.measurements}
        curves = {AXIS_LABELS[axis]: {x: measured[case] for x, case in points.items()} for axis, points in axes.items()}
        draw(curves, f"{config}, {cases[0].work}\n{report.machine}", args.plot)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
