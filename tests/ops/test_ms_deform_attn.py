"""The compiled op against the plain PyTorch truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dino_d2.ops import compiled, ms_deform_attn, ms_deform_attn_reference, require_compiled

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])

# (height, width) of each level, points
LAYOUTS = {
    "1x1": ([(5, 7)], 1),
    "4x4": ([(8, 6), (4, 3), (2, 2), (1, 1)], 4),
    "5x4": ([(9, 5), (5, 3), (3, 2), (2, 1), (1, 1)], 4),
    "3x2": ([(6, 8), (3, 4), (2, 2)], 2),
    "1x7": ([(4, 9)], 7),
}
HEAD_SIZES = [1, 4, 5, 8, 16, 32, 48, 64, 300]
PYRAMID = [(6, 8), (3, 4), (2, 2)]


class Problem(NamedTuple):
    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(self.value.to(dtype), self.shapes, self.locations.to(dtype), self.weights.to(dtype))


def make_problem(
    shapes: list[tuple[int, int]], points: int = 2, channels: int = 8, batch: int = 2, queries: int = 9, heads: int = 2,
    dtype: torch.dtype = torch.float64, device: str = "cpu",
) -> Problem:  # fmt: skip
    """Random numbers that float32 holds exactly, so that every precision starts from the same ones."""
    sizes = (batch, queries, heads, len(shapes), points)
    tokens = sum(height * width for height, width in shapes)
    problem = Problem(
        torch.randn(batch, tokens, heads, channels),
        shapes,
        torch.rand(*sizes, 2) * 1.4 - 0.2,  # a good part lies outside
        torch.rand(sizes),
    )
    return Problem(*(x.to(device, dtype) if isinstance(x, Tensor) else x for x in problem))


def op(problem: Problem) -> Tensor:
    return ms_deform_attn(problem.value, problem.shapes, None, problem.locations, problem.weights)


def reference(problem: Problem) -> Tensor:
    return ms_deform_attn_reference(*problem)


def output_and_gradients(function, problem: Problem, grad_output: Tensor) -> list[Tensor]:
    """The output, then the gradients of value, locations and weights."""
    leaves = [x.detach().clone().requires_grad_() for x in (problem.value, problem.locations, problem.weights)]
    output = function(Problem(leaves[0], problem.shapes, *leaves[1:]))
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def assert_error_at_most(result: Tensor, baseline: Tensor, truth: Tensor, eps: float) -> None:
    """At most twice the error of the baseline, plus a few roundings."""
    error, allowed = (result.double() - truth).abs().max(), (baseline.double() - truth).abs().max()
    assert error <= 2 * allowed + 8 * eps * truth.abs().max()


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", HEAD_SIZES)
def test_float64_equals_reference(channels: int, layout: str, device: str) -> None:
    problem = make_problem(*LAYOUTS[layout], channels, device=device)
    grad = torch.randn(2, 9, 2 * channels, device=device, dtype=torch.float64)
    for ours, truth in zip(
        output_and_gradients(op, problem, grad), output_and_gradients(reference, problem, grad), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", HEAD_SIZES)
def test_float32_is_as_accurate_as_reference(channels: int, layout: str, device: str) -> None:
    problem = make_problem(*LAYOUTS[layout], channels, device=device)
    grad = torch.randn(2, 9, 2 * channels, device=device)
    truths = output_and_gradients(reference, problem, grad)
    baselines = output_and_gradients(reference, problem.to(torch.float32), grad)
    for ours, baseline, truth in zip(
        output_and_gradients(op, problem.to(torch.float32), grad), baselines, truths, strict=True
    ):
        assert ours.dtype == torch.float32
        assert_error_at_most(ours, baseline, truth, torch.finfo(torch.float32).eps)


@on_each_device
@pytest.mark.parametrize("function", [op, reference])
@pytest.mark.parametrize("channels", [1, 5, 16, 32, 64, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_lose_no_more_than_their_rounding(dtype: torch.dtype, channels: int, function, device: str) -> None:
    problem = make_problem(PYRAMID, channels=channels, device=device, dtype=torch.float32)
    problem = problem._replace(value=problem.value.to(dtype))
    grad = torch.randn(2, 9, 2 * channels, device=device).to(dtype)
    truths = output_and_gradients(reference, problem.to(torch.float64), grad.double())
    stored_as = (dtype, dtype, torch.float32, torch.float32)
    for ours, truth, kept in zip(output_and_gradients(function, problem, grad), truths, stored_as, strict=True):
        assert ours.dtype == kept
        assert_error_at_most(ours, truth.to(kept), truth, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("threads", [1, 2, 3])  # of two, each has one and a half of three heads
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [1, 16, 150])  # fewer and more than one thread's share; tokens visited often
def test_every_image_and_query_is_served(queries: int, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    problem = make_problem(PYRAMID, batch=batch, queries=queries, heads=3)
    grad = torch.randn(batch, queries, 24, dtype=torch.float64)
    for ours, truth in zip(
        output_and_gradients(op, problem, grad), output_and_gradients(reference, problem, grad), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("channels", [5, 32, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_query_has_the_same_result_among_many_as_among_few(dtype: torch.dtype, channels: int) -> None:
    """Many queries are served head by head from a copy of the values."""
    problem = make_problem(PYRAMID, channels=channels, queries=150, heads=3, dtype=torch.float32)
    many = problem.to(torch.float32 if dtype == torch.bfloat16 else dtype)._replace(value=problem.value.to(dtype))
    few = many._replace(locations=many.locations[:, 70:75].contiguous(), weights=many.weights[:, 70:75].contiguous())
    assert torch.equal(op(many)[:, 70:75], op(few))


@on_each_device
@pytest.mark.parametrize("function", [op, reference])
@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.25, 0.25, 1.0),  # pixel centres, x before y
        (0.75, 0.25, 2.0),
        (0.25, 0.75, 3.0),
        (0.75, 0.75, 4.0),
        (0.5, 0.25, 1.5),
        (0.5, 0.5, 2.5),
        (0.25, 0.0, 0.5),  # on the outer edge half of the sample lies outside, where there are zeros
        (0.0, 0.0, 0.25),
        (1.0, 1.0, 1.0),
        (1.25, 0.25, 0.0),
    ],
)
def test_location_counts_from_outer_edge(function, x: float, y: float, expected: float, device: str) -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 4, 1, 1)
    location = torch.tensor([x, y], device=device).view(1, 1, 1, 1, 1, 2)
    result = function(Problem(value, [(2, 2)], location, torch.ones(1, 1, 1, 1, 1, device=device)))
    assert result.item() == pytest.approx(expected)


def away_from_knots(shapes: list[tuple[int, int]], sizes: tuple[int, ...]) -> Tensor:
    """Locations at least 0.2 pixels from any pixel centre, where the gradient jumps, and inside the level."""
    locations = torch.empty(*sizes, len(shapes), 1, 2, dtype=torch.float64)
    for level, (height, width) in enumerate(shapes):
        for axis, size in enumerate((width, height)):
            pixel = torch.randint(size - 1, (*sizes, 1)) + 0.2 + 0.6 * torch.rand(*sizes, 1, dtype=torch.float64)
            locations[..., level, :, axis] = (pixel + 0.5) / size
    return locations


@on_each_device
@pytest.mark.parametrize("shapes", [[(3, 5)], [(5, 3), (3, 2)]], ids=["one level", "two levels"])
@pytest.mark.parametrize("channels", [3, 4])
def test_gradcheck(shapes: list[tuple[int, int]], channels: int, device: str) -> None:
    problem = make_problem(shapes, points=1, channels=channels, queries=2, device=device)
    locations = away_from_knots(shapes, (2, 2, 2)).to(device)
    leaves = [x.requires_grad_() for x in (problem.value, locations, problem.weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, None, x, w), leaves)


@on_each_device
def test_second_derivative_is_right_or_refused(device: str) -> None:
    problem = make_problem(PYRAMID, device=device)
    leaves = [problem.value.requires_grad_(), problem.weights.requires_grad_()]
    results = []
    for function in (op, reference):
        (gradient,) = torch.autograd.grad(function(problem).square().sum(), leaves[1], create_graph=True)
        try:
            results.append(torch.autograd.grad(gradient.sum(), leaves))
        except (RuntimeError, NotImplementedError):
            assert function is op
            return
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    value, shapes, locations, weights = make_problem(PYRAMID, dtype=dtype, device=device)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    flat = [size for shape in shapes for size in shape]
    torch.library.opcheck(torch.ops.dino_d2.ms_deform_attn.default, (leaves[0], flat, *leaves[1:]))


@on_each_device
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(wanted: tuple[bool, bool], device: str) -> None:
    value, shapes, locations, weights = make_problem(PYRAMID, dtype=torch.float32, device=device)
    flat = [size for shape in shapes for size in shape]
    grad = torch.randn(2, 9, 16, device=device)
    arguments = (grad, value, flat, locations, weights, *wanted, False)
    torch.library.opcheck(torch.ops.dino_d2.ms_deform_attn_backward.default, arguments)


KERNEL_SET_SCRIPT = """
import sys
import torch
from dino_d2.ops import (
    ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_fused_reference, ms_deform_attn_reference
)

assert torch.ops.dino_d2.cpu_kernels() == sys.argv[1]
torch.manual_seed(0)
shapes = [(6, 8), (3, 4), (2, 2)]
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for channels in (1, 2, 4, 5, 8, 16, 32, 64, 128, 300):
        for points in (1, 3, 4, 7):
            fused = points in (3, 4)
            queries = 5 if channels in (4, 32) else 180  # tokens visited seldom, and often
            value = torch.randn(2, 64, 2, channels).to(dtype)
            sizes = (2, queries, 2, 3, points)
            if fused:
                sampling = torch.randn(*sizes, 2), torch.randn(sizes)
                reference = torch.rand(2, queries, 3, 4 if points == 3 else 2) * 1.2 - 0.1
            else:
                sampling = torch.rand(*sizes, 2) * 1.4 - 0.2, torch.rand(sizes)
            grad = torch.randn(2, queries, 2 * channels).to(dtype)
            results = []
            for wide in (False, True):
                leaves = [x.double() if wide else x.clone() for x in (value, *sampling)]
                leaves = [x.requires_grad_() for x in leaves]
                if fused:
                    function = ms_deform_attn_fused_reference if wide else ms_deform_attn_fused
                    output = function(leaves[0], shapes, reference.to(leaves[1].dtype), *leaves[1:])
                elif wide:
                    output = ms_deform_attn_reference(leaves[0], shapes, *leaves[1:])
                else:
                    output = ms_deform_attn(leaves[0], shapes, None, *leaves[1:])
                results.append([output, *torch.autograd.grad(output, leaves, grad.to(output.dtype))])
            for ours, truth in zip(*results):
                # float32 locations bound the precision of all but the stored rounding
                tolerance = torch.finfo(ours.dtype).eps if ours.dtype == torch.bfloat16 else 2e-5
                scale = truth.abs().max().item()
                torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance * scale)
print("agreed")
"""


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_every_cpu_kernel_set_agrees_with_reference(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNEL_SET_SCRIPT, name],
        env={**os.environ, "DINO_D2_CPU_KERNELS": name},
        capture_output=True,
        text=True,
    )
    if "not among the kernels" in result.stderr and name != "generic":
        pytest.skip(f"this processor has no {name}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "agreed"


@on_each_device
def test_inputs_need_not_be_contiguous(device: str) -> None:
    problem = make_problem(PYRAMID, device=device)
    strided = Problem(
        problem.value.transpose(1, 3).contiguous().transpose(1, 3),
        problem.shapes,
        problem.locations.flip(-1).contiguous().flip(-1).transpose(0, 1).contiguous().transpose(0, 1),
        problem.weights[..., :1].expand_as(problem.weights),
    )
    assert not any(x.is_contiguous() for x in strided if isinstance(x, Tensor))
    # of a plain sum, the gradient that arrives is not contiguous either
    grad = torch.ones(1, 1, 1, device=device, dtype=torch.float64).expand(2, 9, 16)
    for ours, truth in zip(
        output_and_gradients(op, strided, grad), output_and_gradients(reference, strided, grad), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)


@on_each_device
@pytest.mark.parametrize("function", [op, reference])
@pytest.mark.parametrize("place", [-5.0, 7.0, 1e30, -1e30, 3e38, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [5, 16])
def test_sample_outside_contributes_nothing(
    place: float, channels: int, dtype: torch.dtype, function, device: str
) -> None:
    problem = make_problem(PYRAMID, channels=channels, dtype=dtype, device=device)
    grad = torch.randn(2, 9, 2 * channels, device=device, dtype=dtype)
    locations, weights = problem.locations.clone(), problem.weights.clone()
    locations[..., 0, 0], weights[..., 0] = place, 0
    expected = output_and_gradients(op, problem._replace(weights=weights), grad)
    ours = output_and_gradients(function, problem._replace(locations=locations), grad)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])
    assert (ours[2][..., 0, :] == 0).all()
    assert (ours[3][..., 0] == 0).all()
    torch.testing.assert_close(ours[2][..., 1:, :], expected[2][..., 1:, :])
    torch.testing.assert_close(ours[3][..., 1:], expected[3][..., 1:])


@on_each_device
@pytest.mark.parametrize("channels", [5, 16])
def test_nan_in_tokens_that_no_sample_touches_does_not_leak(channels: int, device: str) -> None:
    problem = make_problem([(4, 4), (2, 2)], channels=channels, dtype=torch.float32, device=device)
    problem.locations.copy_(torch.rand_like(problem.locations) * 0.1 + 0.26)  # between the first two rows and columns
    problem.value[:, [2, 3, 8, 15]] = torch.nan
    results = output_and_gradients(op, problem, torch.randn(2, 9, 2 * channels, device=device))
    assert all(x.isfinite().all() for x in results)
    assert (results[1][:, [2, 3, 8, 15]] == 0).all()


@on_each_device
@pytest.mark.parametrize(("batch", "queries", "points"), [(2, 0, 2), (0, 3, 2), (2, 3, 0)])
def test_empty_problem_has_empty_or_zero_result(batch: int, queries: int, points: int, device: str) -> None:
    problem = make_problem(PYRAMID, points, batch=batch, queries=queries, dtype=torch.float32, device=device)
    grad = torch.ones(batch, queries, 16, device=device)
    output, *gradients = output_and_gradients(op, problem, grad)
    assert output.shape == (batch, queries, 16)
    assert not output.any()
    for gradient, leaf in zip(gradients, (problem.value, problem.locations, problem.weights), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize(("heads", "channels"), [(0, 8), (2, 0), (0, 0)])
@pytest.mark.parametrize("queries", [3, 150])
def test_no_heads_or_channels_give_an_empty_result(heads: int, channels: int, queries: int) -> None:
    problem = make_problem(PYRAMID, heads=heads, channels=channels, queries=queries)
    assert op(problem).shape == (2, queries, 0)


@on_each_device
@pytest.mark.parametrize("starts", [None, [0, 48, 60], (0, 48, 60), torch.tensor([0, 48, 60])], ids=repr)
@pytest.mark.parametrize("as_shapes", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_shapes_and_starts_may_be_sequences_or_tensors(as_shapes, starts, device: str) -> None:
    problem = make_problem(PYRAMID, device=device)
    result = ms_deform_attn(problem.value, as_shapes(PYRAMID), starts, problem.locations, problem.weights)
    torch.testing.assert_close(result, reference(problem))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shapes_and_starts_may_be_on_the_gpu() -> None:
    problem = make_problem(PYRAMID, device="cuda")
    shapes, starts = torch.tensor(PYRAMID, device="cuda"), torch.tensor([0, 48, 60], device="cuda")
    result = ms_deform_attn(problem.value, shapes, starts, problem.locations, problem.weights)
    torch.testing.assert_close(result, reference(problem))


def wrong_arguments() -> list:
    value, shapes, locations, weights = make_problem(PYRAMID)
    cases = {
        "value without heads": ("value", (value.flatten(2), shapes, None, locations, weights)),
        "integer value": ("value", (value.long(), shapes, None, locations, weights)),
        "locations without points": ("sampling_locations", (value, shapes, None, locations[..., 0, :], weights)),
        "locations with three numbers": (
            "sampling_locations",
            (value, shapes, None, torch.cat([locations, locations[..., :1]], -1), weights),
        ),
        "locations of another batch": ("sampling_locations", (value, shapes, None, locations[:1], weights[:1])),
        "locations of other heads": (
            "sampling_locations",
            (value, shapes, None, locations[:, :, :1], weights[:, :, :1]),
        ),
        "locations with too few levels": (
            "sampling_locations",
            (value, shapes, None, locations[:, :, :, :2], weights[:, :, :, :2]),
        ),
        "weights of other points": ("attention_weights", (value, shapes, None, locations, weights[..., :1])),
        "shapes of other tokens": ("spatial_shapes", (value, [(6, 8), (3, 4), (2, 3)], None, locations, weights)),
        "starts as a list": ("level_start_index", (value, shapes, [0, 48, 61], locations, weights)),
        "starts as a tensor": ("level_start_index", (value, shapes, torch.tensor([0, 48]), locations, weights)),
        "locations elsewhere": ("sampling_locations", (value, shapes, None, locations.to("meta"), weights)),
        "weights elsewhere": ("attention_weights", (value, shapes, None, locations, weights.to("meta"))),
    }  # fmt: skip
    return [pytest.param(name, arguments, id=case) for case, (name, arguments) in cases.items()]


@pytest.mark.parametrize(("name", "arguments"), wrong_arguments())
def test_wrong_argument_is_named(name: str, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        ms_deform_attn(*arguments)


@pytest.mark.parametrize(
    ("complaint", "change"),
    [
        ("must be positive", {"flat": [-6, -8, 3, 4, 2, 2]}),
        ("pairs of", {"flat": [6, 8, 3]}),
        ("add up to", {"flat": [6, 8, 3, 4, 2, 3]}),
        ("must be", {"dtype": torch.float32}),
    ],
)
def test_operator_itself_refuses_what_would_leave_its_memory(complaint: str, change: dict) -> None:
    value, shapes, locations, weights = make_problem(PYRAMID)
    flat = change.get("flat", [size for shape in shapes for size in shape])
    locations = locations.to(change.get("dtype", locations.dtype))
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.dino_d2.ms_deform_attn(value, flat, locations, weights)


def test_more_values_than_32_bits_can_number_are_refused() -> None:
    height, width = 2**12, 2**11
    value = torch.zeros(1).expand(1, height * width, 8, 32)  # takes no memory
    locations, weights = torch.zeros(1, 1, 8, 1, 1, 2), torch.ones(1, 1, 8, 1, 1)
    with pytest.raises(RuntimeError, match="2147483648 values"):
        torch.ops.dino_d2.ms_deform_attn(value, [height, width], locations, weights)
    arguments = (torch.zeros(1, 1, 256), value, [height, width], locations, weights, True, True, False)
    with pytest.raises(RuntimeError, match="2147483648 values"):
        torch.ops.dino_d2.ms_deform_attn_backward(*arguments)


@on_each_device
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["value", "locations", "weights", "value+weights"])
def test_gradient_of_some_inputs_is_that_of_all(wanted: tuple[int, ...], device: str) -> None:
    problem = make_problem(PYRAMID, device=device)
    grad = torch.randn(2, 9, 16, device=device, dtype=torch.float64)
    expected = output_and_gradients(op, problem, grad)[1:]
    inputs = [problem.value, problem.locations, problem.weights]
    leaves = [x.requires_grad_() for i, x in enumerate(inputs) if i in wanted]
    gradients = torch.autograd.grad(op(problem), leaves, grad)
    for i, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[i])


@on_each_device
def test_result_keeps_dtype_of_value_under_autocast(device: str) -> None:
    problem = make_problem(PYRAMID, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(op(problem), reference(problem))
        halves = problem._replace(value=problem.value.bfloat16())
        results = [op(halves), reference(halves)]
    truth = reference(halves._replace(value=halves.value.float()))
    for result in results:
        torch.testing.assert_close(result, truth.bfloat16())


@on_each_device
@pytest.mark.parametrize("function", [op, reference])
def test_half_locations_and_weights_are_widened_and_get_half_gradients(function, device: str) -> None:
    problem = make_problem(PYRAMID, dtype=torch.float32, device=device)
    halves = problem._replace(locations=problem.locations.half(), weights=problem.weights.half())
    results = output_and_gradients(function, halves, torch.ones(2, 9, 16, device=device))
    torch.testing.assert_close(results[0], reference(halves.to(torch.float32)))
    assert [x.dtype for x in results] == [torch.float32, torch.float32, torch.float16, torch.float16]


class Twice(torch.nn.Module):
    """The op between two other operations."""

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value * 2, PYRAMID, None, locations, weights.softmax(-1)) + 1


def test_compiles_without_a_graph_break() -> None:
    value, _, locations, weights = make_problem(PYRAMID, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    expected = Twice()(*leaves)
    result = torch.compile(Twice(), fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(result, expected)
    for ours, truth in zip(
        torch.autograd.grad(result.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, truth)


def test_exports_for_any_number_of_queries() -> None:
    value, _, locations, weights = make_problem(PYRAMID, dtype=torch.float32)
    queries = {1: torch.export.Dim("queries", min=2)}
    program = torch.export.export(Twice(), (value, locations, weights), dynamic_shapes=(None, queries, queries))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "dino_d2.ms_deform_attn.default" in targets
    fewer = (value, locations[:, :4].contiguous(), weights[:, :4].contiguous())
    torch.testing.assert_close(program.module()(*fewer), Twice()(*fewer))


def test_exported_program_takes_inputs_that_are_not_contiguous() -> None:
    value, _, locations, weights = make_problem(PYRAMID, dtype=torch.float32)
    program = torch.export.export(Twice(), (value, locations, weights))
    strided = value, locations.transpose(0, 1).contiguous().transpose(0, 1), weights
    torch.testing.assert_close(program.module()(*strided), Twice()(*strided))


def test_binary_is_there() -> None:
    """The tests above would pass on the plain PyTorch formulation alone."""
    assert compiled()
    require_compiled()


WITHOUT_BINARY_SCRIPT = """
import json, sys, warnings
sys.modules["dino_d2.ops._C"] = None
import torch
from dino_d2.ops import compiled, ms_deform_attn, ms_deform_attn_reference, require_compiled

value = torch.randn(1, 6, 1, 4, requires_grad=True)
arguments = torch.rand(1, 3, 1, 1, 2, 2), torch.rand(1, 3, 1, 1, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        result = ms_deform_attn(value, [(2, 3)], None, *arguments)
        half = ms_deform_attn(value.bfloat16(), [(2, 3)], None, *arguments)
result.sum().backward()
try:
    require_compiled()
    refusal = None
except ImportError as error:
    refusal = str(error)
print(json.dumps({
    "compiled": compiled(),
    "equal": torch.equal(result, ms_deform_attn_reference(value, [(2, 3)], *arguments)),
    "has_gradient": bool(value.grad.any()),
    "half_dtype": str(half.dtype),
    "warnings": [str(w.message) for w in caught if "dino_d2" in str(w.message)],
    "refusal": refusal,
}))
"""


@pytest.fixture(scope="module")
def without_binary() -> dict:
    """What happens in a process that cannot import the compiled kernels."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_BINARY_SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_reference_serves_without_binary(without_binary: dict) -> None:
    assert not without_binary["compiled"]
    assert without_binary["equal"]
    assert without_binary["has_gradient"]
    assert without_binary["half_dtype"] == "torch.bfloat16"


def test_missing_binary_is_reported_once_with_reason_and_remedy(without_binary: dict) -> None:
    (warning,) = without_binary["warnings"]
    assert "could not be loaded (import of dino_d2.ops._C halted" in warning
    assert "pip install --no-build-isolation -e ." in warning


def test_requiring_the_missing_binary_raises_with_reason_and_remedy(without_binary: dict) -> None:
    assert "import of dino_d2.ops._C halted" in without_binary["refusal"]
    assert "pip install --no-build-isolation -e ." in without_binary["refusal"]
