#!/usr/bin/env python3
"""Time multi-scale deformable attention: ours, PyTorch's grid_sample, and other installed implementations.

    dev/benchmark_op.py                                       float32 on the CPU, encoder of DINO-4scale at 800x1333
    dev/benchmark_op.py --dtype bfloat16 --shape decoder
    dev/benchmark_op.py --device cuda --locations random

All are first compared with float64, then timed in interleaved rounds, so that other load affects them alike. On a GPU
its own clock is read before and after many calls, made from Python and replayed as a graph, which leaves out what the
host needs for a call. Prints a Markdown table. The exit code is 1 if one of our results is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from dino_d2.ops import (
    attention_weights_of,
    compiled,
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_reference,
    sampling_locations_of,
)

HEADS, CHANNELS, POINTS = 8, 32, 4
FOUR_SCALES = [(100, 167), (50, 84), (25, 42), (13, 21)]  # of 800x1333
FIVE_SCALES = [(200, 334), *FOUR_SCALES]
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
PEERS = [  # package, module, function of value, shapes, starts of levels, locations, weights
    ("torch-ms-deform-attn", "torch_ms_deform_attn", "ms_deform_attn"),
    ("deformops", "deformops.registry", "msda"),
]
BASELINE = "design of 2020, float32"
CALLS = 50  # between two looks at a GPU's clock
LOCAL_SPREAD = 0.03  # standard deviation of sample offsets, relative to the image


@dataclass(frozen=True)
class Problem:
    """Inputs; sizes as in `dino_d2.ops.ms_deform_attn`. Locations and weights follow from the other fields."""

    value: Tensor
    shapes: list[tuple[int, int]]
    reference: Tensor
    offsets: Tensor
    logits: Tensor

    @property
    def locations(self) -> Tensor:
        return sampling_locations_of(self.reference, self.offsets, self.shapes)

    @property
    def weights(self) -> Tensor:
        return attention_weights_of(self.logits)


@dataclass(frozen=True)
class Contestant:
    """An implementation. `run` takes `leaves`, which require gradients: values, then locations and weights, or offsets
    and logits."""

    name: str
    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    is_ours: bool = False
    makes_locations: bool = False


@dataclass
class Times:
    """Seconds of a call in each round; `replayed`: as a graph on a GPU, empty elsewhere and where that fails."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    replayed_forward: list[float] = field(default_factory=list)
    replayed_backward: list[float] = field(default_factory=list)


def make_problem(shape: str, locations: str, dtype: torch.dtype, device: str) -> Problem:
    torch.manual_seed(0)
    shapes = FIVE_SCALES if shape == "5scale" else FOUR_SCALES
    tokens = sum(height * width for height, width in shapes)
    if shape == "decoder":
        centres = torch.rand(900, 2)
    else:  # one query per token
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
        centres = torch.cat(grids).flip(-1)
    sizes = (1, len(centres), HEADS, len(shapes), POINTS)
    reference = centres[None, :, None].repeat(1, 1, len(shapes), 1)
    pixels = torch.tensor([(w, h) for h, w in shapes])[:, None]
    if locations == "local":
        offsets = torch.randn(*sizes, 2) * LOCAL_SPREAD * pixels
    else:
        offsets = (torch.rand(*sizes, 2) - centres[None, :, None, None, None]) * pixels
    # Keep samples away from the kinks of bilinear interpolation, so that rounding cannot cross one.
    origin = centres[None, :, None, None, None] * pixels - 0.5
    cell = (origin + offsets).floor()
    offsets = cell + (origin + offsets - cell).clamp(0.01, 0.99) - origin
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    problem = (torch.randn(1, tokens, HEADS, CHANNELS).to(dtype), reference, offsets, torch.randn(sizes))
    value, *sampling = (x.to(device) for x in problem)
    return Problem(value, shapes, *(x.to(accumulate) for x in sampling))


def contestants(problem: Problem) -> list[Contestant]:
    shapes = problem.shapes

    def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)

    def grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(value, shapes, locations, weights)

    def plain(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, shapes, None, locations, weights)

    def chain(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        locations = sampling_locations_of(problem.reference, offsets, shapes)
        return plain(value, locations, attention_weights_of(logits))

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, shapes, problem.reference, offsets, logits)

    located = (problem.value, problem.locations, problem.weights)
    predicted = (problem.value, problem.offsets, problem.logits)
    result = [
        Contestant("grid_sample", grid_sample, leaves(*located)),
        Contestant("dino_d2, plain", plain, leaves(*located), is_ours=True),
        Contestant("softmax, locations, dino_d2 plain", chain, leaves(*predicted), is_ours=True, makes_locations=True),
        Contestant("dino_d2, fused", fused, leaves(*predicted), is_ours=True, makes_locations=True),
    ]
    if problem.value.is_cuda:
        result.append(Contestant(BASELINE, baseline_2020(shapes), leaves(*map(Tensor.float, located))))
    for name, peer in peers_of(problem).items():
        result.append(Contestant(name, peer, leaves(*located)))
    return result


def baseline_2020(shapes: list[tuple[int, int]]) -> Callable[..., Tensor]:
    """dev/baseline_2020.cu, compiled for this GPU."""
    source = Path(__file__).with_name("baseline_2020.cu")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "baseline_2020.so")
        command = ["nvcc", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", "-O3", "-std=c++17", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-arch=sm_{major}{minor}"]
        command += [f"-I{path}" for path in include_paths("cuda")] + [f"-L{path}" for path in library_paths("cuda")]
        command += ["-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        torch.ops.load_library(library)
    flat = [size for shape in shapes for size in shape]

    class Baseline(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            value, locations, weights = inputs
            return torch.ops.dino_d2_baseline_2020.forward(value, flat, locations, weights)

        @staticmethod
        def backward(ctx, grad_output: Tensor) -> tuple[Tensor, ...]:
            value, locations, weights = ctx.saved_tensors
            grad_output = grad_output.contiguous()
            return torch.ops.dino_d2_baseline_2020.backward(grad_output, value, flat, locations, weights)

    return Baseline.apply


def peers_of(problem: Problem) -> dict[str, Callable[..., Tensor]]:
    """Other installed implementations that support this device and dtype."""
    shapes = torch.tensor(problem.shapes, device=problem.value.device)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    found = {}
    for package, module, function in PEERS:
        try:
            call = getattr(importlib.import_module(module), function)
        except ImportError:
            continue

        def peer(value: Tensor, locations: Tensor, weights: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(value, shapes, starts, locations, weights)

        name = f"{package} {importlib.metadata.version(package)}"
        try:
            peer(problem.value, problem.locations, problem.weights)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            print(f"skipping {name}: {str(error).splitlines()[0]}\n")
            continue
        found[name] = peer
    return found


def largest_error(contestant: Contestant, truths: dict[bool, list[Tensor]]) -> float:
    """Largest error of output and gradients compared with float64, each relative to its largest value."""
    output = contestant.run(*contestant.leaves)
    ours = [output, *torch.autograd.grad(output.sum(), contestant.leaves)]
    errors = []
    for result, truth in zip(ours, truths[contestant.makes_locations], strict=True):
        errors.append(((result.double() - truth).abs().max() / truth.abs().max()).item())
    return max(errors)


def truth_of(problem: Problem) -> dict[bool, list[Tensor]]:
    """Output and gradients in float64, for locations and weights (False) or for offsets and logits (True)."""
    wide = Problem(
        problem.value.double().requires_grad_(),
        problem.shapes,
        problem.reference.double(),
        problem.offsets.double().requires_grad_(),
        problem.logits.double().requires_grad_(),
    )
    locations, weights = wide.locations, wide.weights
    output = ms_deform_attn_reference(wide.value, wide.shapes, locations, weights)
    leaves = (wide.value, locations, weights, wide.offsets, wide.logits)
    of_value, of_locations, of_weights, of_offsets, of_logits = torch.autograd.grad(output.sum(), leaves)
    output = output.detach()
    return {False: [output, of_value, of_locations, of_weights], True: [output, of_value, of_offsets, of_logits]}


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Seconds that a call takes: on a GPU the average of many, by its own clock."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def graphs_of(entrant: Contestant, grad_output: Tensor) -> tuple[Callable[[], None], Callable[[], None]] | None:
    """Replay of the forward pass, and of forward and backward pass; None if it cannot be captured."""

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(entrant.run(*entrant.leaves), entrant.leaves, grad_output)

    def forward() -> Tensor:
        with torch.no_grad():
            return entrant.run(*entrant.leaves)

    replays = []
    for function in (forward, both):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except RuntimeError as error:
            print(f"{entrant.name} in a graph: {str(error).splitlines()[0]}\n")
            return None
        replays.append(graph.replay)
    return tuple(replays)


def measure(entrants: list[Contestant], device: str, seconds: float) -> dict[str, Times]:
    times = {entrant.name: Times() for entrant in entrants}
    grads = {entrant.name: torch.randn_like(entrant.run(*entrant.leaves)) for entrant in entrants}
    graphs = {}
    if device != "cpu":
        graphs = {entrant.name: graphs_of(entrant, grads[entrant.name]) for entrant in entrants}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        for entrant in entrants:
            leaves = entrant.leaves
            with torch.no_grad():
                entrant.run(*leaves)  # so that the caches do not hold another contestant's data
                forward = seconds_of(lambda entrant=entrant: entrant.run(*entrant.leaves), device)
            output, grad = entrant.run(*leaves), grads[entrant.name]
            backward = seconds_of(
                lambda output=output, leaves=leaves, grad=grad: torch.autograd.grad(
                    output, leaves, grad, retain_graph=True
                ),
                device,
            )
            replayed = [seconds_of(replay, device) for replay in graphs.get(entrant.name) or ()]
            if rounds == 0:  # warms up
                continue
            of_entrant = times[entrant.name]
            of_entrant.forward.append(forward)
            of_entrant.backward.append(backward)
            if replayed:
                of_entrant.replayed_forward.append(replayed[0])
                of_entrant.replayed_backward.append(replayed[1] - replayed[0])
        rounds += 1
    return times


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second when copying a large tensor, best of ten."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best


def least_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes that forward and backward must move if everything is read or written once."""
    value = problem.value.numel() * problem.value.element_size()
    sampling = sum(x.numel() * x.element_size() for x in (problem.offsets, problem.logits))
    output = problem.offsets.shape[1] * prod(problem.value.shape[2:]) * problem.value.element_size()
    return value + sampling + output, 2 * value + 2 * sampling + output


def print_table(
    title: str,
    times: dict[str, Times],
    errors: dict[str, float],
    floors: list[float],
    select: Callable[[Times], tuple[list[float], list[float]]],
) -> None:
    """Medians of what `select` picks; ratios to the first contestant."""
    medians = {name: [statistics.median(part) for part in select(of)] for name, of in times.items()}
    slow = next(iter(medians.values()))
    print(f"| {title} | forward (ms) | ratio | of copy speed | backward (ms) | ratio | of copy speed | both | error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, both in medians.items():
        cells = [
            f"{mine * 1e3:.3g} | {theirs / mine:.1f} | {floor / mine:.0%}"
            for mine, theirs, floor in zip(both, slow, floors, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} | {sum(slow) / sum(both):.1f} | {errors[name]:.0e} |")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the values (default float32)")
    parser.add_argument("--shape", choices=("4scale", "5scale", "decoder"), default="4scale")
    parser.add_argument("--locations", choices=("local", "random"), default="local", help="distribution of samples")
    parser.add_argument("--once", action="store_true", help="only call ours and the design of 2020, for a profiler")
    parser.add_argument("--seconds", type=float, default=30, help="total time for timing (default 30)")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.accelerator.is_available():
        sys.exit(f"--device {args.device} is not available; use --device cpu")
    if not compiled(args.device):
        print(f"no kernels for {args.device}: dino_d2 below is the reference\n")

    problem = make_problem(args.shape, args.locations, DTYPES[args.dtype], args.device)
    entrants = contestants(problem)
    if args.once:
        for entrant in entrants:
            if entrant.name in ("dino_d2, fused", BASELINE):
                output = entrant.run(*entrant.leaves)
                torch.autograd.grad(output, entrant.leaves, torch.randn_like(output))
        return 0
    truths = truth_of(problem)
    errors = {entrant.name: largest_error(entrant, truths) for entrant in entrants}
    allowed = max(2 * errors["grid_sample"], 1e-5)  # twice the error of grid_sample
    del truths
    times, bandwidth = measure(entrants, args.device, args.seconds), copy_bandwidth(args.device)
    floors = [size / bandwidth for size in least_bytes(problem)]

    kernels = f", {torch.ops.dino_d2.cpu_kernels()} kernels" if args.device == "cpu" and compiled() else ""
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"{args.shape}, {args.dtype} values, {args.locations} locations; {machine}, {torch.get_num_threads()} threads"
        f"{kernels}, torch {torch.__version__}; copies {bandwidth / 1e9:.1f} GB/s; medians of "
        f"{len(times['grid_sample'].forward)} rounds\n"
    )
    print_table("Called from Python", times, errors, floors, lambda of: (of.forward, of.backward))
    if args.device != "cpu":
        replayed = {name: of for name, of in times.items() if of.replayed_forward}
        print_table("Replayed", replayed, errors, floors, lambda of: (of.replayed_forward, of.replayed_backward))
    wrong = [entrant.name for entrant in entrants if entrant.is_ours and not errors[entrant.name] <= allowed]
    if wrong:
        print(f"\nwrong: {', '.join(wrong)} (more than {allowed:.0e} from float64)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
