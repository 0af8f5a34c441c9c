"""The CUDA kernels' arithmetic, run on the CPU by tests/ops/cuda_on_cpu: what can be known of them without a GPU."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_d2.ops import attention_weights_of, ms_deform_attn_reference, sampling_locations_of

SOURCE = Path(__file__).parent / "cuda_on_cpu" / "kernels.cpp"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of kernels.cpp
# Roundings of what is stored, of the output; gradients are in the precision of the sums.
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ARCHITECTURES = [800, 900]  # without and with additions of four numbers at once
PYRAMID = [(9, 11), (5, 6), (2, 3)]  # none of them a multiple of a tile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Call(ctypes.Structure):
    """As in kernels.cpp."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("dtype", "batch", "tokens", "heads", "channels", "queries", "levels")]
        + [("points", ctypes.c_int64), ("shapes", ctypes.POINTER(ctypes.c_int64))]
        + [(name, ctypes.c_void_p) for name in ("value", "positions", "weights", "reference")]
        + [("reference_size", ctypes.c_int64), ("output", ctypes.c_void_p), ("grad_output", ctypes.c_void_p)]
        + [(name, ctypes.c_void_p) for name in ("grad_value", "grad_positions", "grad_weights")]
        + [(name, ctypes.c_int64) for name in ("deterministic", "aligned", "backwards", "samples_as_values")]
    )


@dataclass
class Problem:
    """`reference`: positions are offsets and weights logits; None: locations and weights. See dino_d2.ops."""

    value: Tensor
    shapes: list[tuple[int, int]]
    reference: Tensor | None
    positions: Tensor
    weights: Tensor
    grad_output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch, _, heads, channels = self.value.shape
        self.grad_output = torch.randn(batch, self.weights.shape[1], heads * channels).to(self.value.dtype)

    def truth(self) -> list[Tensor]:
        """Output, gradients of value, positions and weights, in float64."""
        leaves = [x.double().requires_grad_() for x in (self.value, self.positions, self.weights)]
        value, locations, weights = leaves
        if self.reference is not None:
            locations = sampling_locations_of(self.reference.double(), locations, self.shapes)
            weights = attention_weights_of(weights)
        output = ms_deform_attn_reference(value, self.shapes, locations, weights)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.grad_output.double())]


def make_problem(
    dtype: torch.dtype, channels: int, shapes: list[tuple[int, int]] = PYRAMID, points: int = 2,
    queries: int | None = 13, batch: int = 2, heads: int = 2, reference_size: int = 0,
) -> Problem:  # fmt: skip
    """`queries` None: as many as tokens."""
    tokens = sum(height * width for height, width in shapes)
    sizes = (batch, tokens if queries is None else queries, heads, len(shapes), points)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(batch, tokens, heads, channels).to(dtype)
    if reference_size == 0:
        positions, weights, reference = torch.rand(*sizes, 2) * 1.4 - 0.2, torch.rand(sizes), None
    else:
        positions, weights = torch.randn(*sizes, 2), torch.randn(sizes)
        reference = torch.rand(batch, sizes[1], len(shapes), reference_size).to(accumulate)
    return Problem(value, shapes, reference, positions.to(accumulate), weights.to(accumulate))


class Traffic(ctypes.Structure):
    """As in cuda_on_cpu.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("instructions", "lines", "sectors")]


class Kernels:
    """The kernels as an architecture compiles them."""

    def __init__(self, binary: Path, architecture: int) -> None:
        command = ["g++", "-O1", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
        subprocess.run([*command, f"-D__CUDA_ARCH__={architecture}", str(SOURCE), "-o", str(binary)], check=True)
        self.library = ctypes.CDLL(str(binary))
        self.library.backward.restype = Traffic
        self.traffic = Traffic()  # of the last call

    def __call__(
        self, problem: Problem, value_wanted: bool = True, sampling_wanted: bool = True, deterministic: bool = False,
        aligned: bool = True, backwards: bool = False,
    ) -> list[Tensor | None]:  # fmt: skip
        """Output, gradients of value, positions and weights; None where not wanted."""
        value, positions, weights = problem.value, problem.positions, problem.weights
        batch, tokens, heads, channels = value.shape
        accumulate = torch.float64 if value.dtype == torch.float64 else torch.float32
        # What is written whole begins as rubbish.
        output = torch.full((batch, weights.shape[1], heads * channels), float("nan")).to(value.dtype)
        grads = [
            torch.full_like(value, float("nan") if deterministic else 0, dtype=accumulate) if value_wanted else None,
            torch.full_like(positions, float("nan")) if sampling_wanted else None,
            torch.full_like(weights, float("nan")) if sampling_wanted else None,
        ]
        sides = [side for shape in problem.shapes for side in shape]
        pointers = (problem.reference, output, problem.grad_output, *grads)
        reference, *others = (None if x is None else x.data_ptr() for x in pointers)
        arguments = Call(
            DTYPES.index(value.dtype), batch, tokens, heads, channels, *weights.shape[1:2], *weights.shape[3:5],
            (ctypes.c_int64 * len(sides))(*sides), value.data_ptr(), positions.data_ptr(), weights.data_ptr(),
            reference, 0 if problem.reference is None else problem.reference.shape[-1], *others,
            deterministic, aligned, backwards, positions.dtype != accumulate,
        )  # fmt: skip
        self.library.forward(ctypes.byref(arguments))
        self.traffic = self.library.backward(ctypes.byref(arguments))
        return [output, *grads]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Kernels]:
    folder = tmp_path_factory.mktemp("kernels")
    return functools.cache(lambda architecture: Kernels(folder / f"{architecture}.so", architecture))


@pytest.fixture
def run(built: Callable[[int], Kernels], request: pytest.FixtureRequest) -> Kernels:
    return built(getattr(request, "param", 900))


on_each_architecture = pytest.mark.parametrize("run", ARCHITECTURES, indirect=True)


def assert_close(results: list[Tensor | None], truths: list[Tensor], dtype: torch.dtype) -> None:
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    for result, truth, tolerance in zip(results, truths, (ROUNDING[dtype], exact, exact, exact), strict=True):
        if result is None:
            continue
        error = (result.double() - truth).abs().max()
        assert error <= tolerance * (truth.abs().max() + 1e-6)  # a softmax over one sample has no gradient


LAYOUTS = [  # each of plan.h, and head sizes that none is made for
    *[(torch.float32, channels) for channels in (16, 32, 64, 5, 12, 48)],
    *[(torch.float64, channels) for channels in (8, 32, 33)],
    *[(dtype, channels) for dtype in (torch.bfloat16, torch.float16) for channels in (32, 64, 128, 20)],
]


@on_each_architecture
@pytest.mark.parametrize("reference_size", [0, 2, 4], ids=["plain", "points", "boxes"])
@pytest.mark.parametrize(("dtype", "channels"), LAYOUTS, ids=lambda x: str(x).removeprefix("torch."))
def test_every_layout(run, dtype: torch.dtype, channels: int, reference_size: int) -> None:
    problem = make_problem(dtype, channels, reference_size=reference_size)
    assert_close(run(problem), problem.truth(), dtype)


@on_each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_in_tiles(run, dtype: torch.dtype) -> None:
    problem = make_problem(dtype, 32, queries=None, reference_size=4)
    assert_close(run(problem), problem.truth(), dtype)


@on_each_architecture
@pytest.mark.parametrize("queries", [70, None])
@pytest.mark.parametrize("reference_size", [0, 2, 4], ids=["plain", "points", "boxes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_levels_of_four_points(run, dtype: torch.dtype, reference_size: int, queries: int | None) -> None:
    """Which have kernels of their own."""
    problem = make_problem(dtype, 32, [(8, 9), (4, 5), (2, 3), (1, 2)], 4, queries, reference_size=reference_size)
    assert_close(run(problem), problem.truth(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_and_logits_in_16_bits(run, dtype: torch.dtype) -> None:
    problem = make_problem(dtype, 32, [(8, 9), (4, 5), (2, 3), (1, 2)], 4, 70, reference_size=4)
    problem.positions, problem.weights = problem.positions.to(dtype), problem.weights.to(dtype)
    results, truths = run(problem), problem.truth()
    assert [result.dtype for result in results] == [dtype, torch.float32, dtype, dtype]
    assert_close([*results[:2], None, None], truths, dtype)
    for result, truth in zip(results[2:], truths[2:], strict=True):
        torch.testing.assert_close(result, truth.to(dtype), rtol=ROUNDING[dtype], atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize(("levels", "points"), [(1, 1), (1, 7), (4, 4), (5, 4), (3, 8)])
def test_numbers_of_levels_and_points(run, levels: int, points: int) -> None:
    """Fewer samples than lanes take at once, more, and no multiple of it."""
    shapes = [(8, 9), (4, 5), (2, 3), (1, 2), (1, 1)][:levels]
    problem = make_problem(torch.float32, 32, shapes, points, queries=70, reference_size=2)
    assert_close(run(problem), problem.truth(), torch.float32)


@pytest.mark.parametrize(("value_wanted", "sampling_wanted"), [(True, False), (False, True)])
def test_gradients_of_some_inputs(run, value_wanted: bool, sampling_wanted: bool) -> None:
    problem = make_problem(torch.float32, 32, reference_size=4)
    results = run(problem, value_wanted=value_wanted, sampling_wanted=sampling_wanted)
    assert [result is not None for result in results] == [True, value_wanted, sampling_wanted, sampling_wanted]
    assert_close(results, problem.truth(), torch.float32)


def test_values_may_begin_anywhere(run) -> None:
    problem = make_problem(torch.float32, 32)
    assert_close(run(problem, aligned=False), problem.truth(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 4])
def test_samples_outside_read_nothing(run, levels: int, dtype: torch.dtype) -> None:
    height, width = 5, 6
    problem = make_problem(dtype, 32, [(height, width)] * levels, points=4, queries=7)
    for query, place in enumerate((-5.0, 7.0, 1e30, float("inf"), float("nan"))):
        problem.positions[:, query] = place
    problem.positions[:, 5:] = torch.tensor([1 / width, 1 / height])  # between the first four pixels of a level
    problem.positions[:, 6, :, 0, :3] = 7.0  # but for three samples, which are outside
    problem.value[:] = float("nan")
    for level in range(levels):
        problem.value[:, [level * height * width + i for i in (0, 1, width, width + 1)]] = 1
    problem.grad_output.view(2, 7, 2, 32)[:, 0] = float("nan")  # reaches no value
    output, grad_value, grad_locations, grad_weights = run(problem)
    assert output.isfinite().all()
    assert (output[:, :5] == 0).all()
    assert grad_value.isfinite().all()
    assert (grad_value[:, 0] != 0).any()
    assert (grad_locations[:, :5] == 0).all()
    assert (grad_weights[:, :5] == 0).all()
    assert (grad_weights[:, 6, :, 0, :3] == 0).all()
    assert grad_locations.isfinite().all()


@pytest.mark.parametrize("reference_size", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_deterministic_gradient(run, dtype: torch.dtype, reference_size: int) -> None:
    problem = make_problem(dtype, 16, reference_size=reference_size)
    problem.weights *= 100
    first, second = (run(problem, deterministic=True, backwards=backwards)[1] for backwards in (False, True))
    assert torch.equal(first, second)
    # 61 bits, less those of the number of additions
    error = (first.double() - problem.truth()[1]).abs().max() / problem.truth()[1].abs().max()
    assert error <= (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_deterministic_gradient_of_something_infinite_is_not_a_number(run, value: float) -> None:
    problem = make_problem(torch.float32, 16)
    problem.grad_output[0, 0, 0] = value
    assert run(problem, deterministic=True)[1].isnan().all()


def test_result_does_not_depend_on_the_order_of_lanes(run) -> None:
    problem = make_problem(torch.float32, 64, queries=5, reference_size=4)
    for forwards, backwards in zip(run(problem), run(problem, backwards=True), strict=True):
        torch.testing.assert_close(forwards, backwards, rtol=1e-5, atol=1e-6)


def count_additions(
    run: Kernels, dtype: torch.dtype, channels: int, levels: int = 1, points: int = 1, deterministic: bool = False
) -> list[float]:
    """Instructions, cache lines and sectors of 32 bytes that additions take, per row and corner."""
    height, width, rows, heads = 8, 32, 64, 2  # a multiple of the rows of any block
    problem = make_problem(dtype, channels, [(height, width)] * levels, points, rows, batch=1, heads=heads)
    query = torch.arange(rows)  # each between four pixels of its own
    column, line = query % (width // 2) * 2 + 1, query // (width // 2) * 2 + 1
    problem.positions[:] = torch.stack((column / width, line / height), -1).view(1, rows, 1, 1, 1, 2)
    run(problem, deterministic=deterministic)
    corners = rows * heads * levels * points * 4
    return [getattr(run.traffic, name) / corners for name in ("instructions", "lines", "sectors")]


@on_each_architecture
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_additions_touch_no_sector_twice(run, dtype: torch.dtype, channels: int) -> None:
    """Part of a sector costs as much as all of it."""
    size = 8 if dtype == torch.float64 else 4
    assert count_additions(run, dtype, channels)[2] == channels * size / 32


@on_each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additions_for_four_levels_of_four_points_touch_no_sector_twice(run, dtype: torch.dtype) -> None:
    assert count_additions(run, dtype, 32, levels=4, points=4)[2] == 32 * 4 / 32


def test_deterministic_additions_touch_no_sector_twice(run) -> None:
    assert count_additions(run, torch.float32, 32, deterministic=True)[2] == 32 * 8 / 32


def print_additions() -> None:
    """The table in docs/performance.md."""
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            kernels = Kernels(Path(folder, f"{architecture}.so"), architecture)
            for dtype in DTYPES:
                counts = {channels: count_additions(kernels, dtype, channels) for channels in (16, 32, 64, 128)}
                print(f"sm_{architecture // 10} {dtype}: instructions, lines and sectors by channels: {counts}")


if __name__ == "__main__":
    print_additions()
