"""The fused op against its separate steps."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dino_d2.ops import (
    ms_deform_attn,
    ms_deform_attn_fused,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
    sampling_locations_of,
)

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
PYRAMID = [(6, 8), (3, 4), (2, 2)]
POINT, BOX = 2, 4
on_points_and_boxes = pytest.mark.parametrize("reference_size", [POINT, BOX], ids=["points", "boxes"])


class Problem(NamedTuple):
    value: Tensor
    shapes: list[tuple[int, int]]
    reference: Tensor
    offsets: Tensor
    logits: Tensor


def make_problem(
    reference_size: int, shapes: list[tuple[int, int]] = PYRAMID, points: int = 2, channels: int = 8, queries: int = 9,
    dtype: torch.dtype = torch.float64, device: str = "cpu",
) -> Problem:  # fmt: skip
    sizes = (2, queries, 2, len(shapes), points)
    problem = Problem(
        torch.randn(2, sum(height * width for height, width in shapes), 2, channels),
        shapes,
        torch.rand(2, queries, len(shapes), reference_size) * 1.2 - 0.1,  # some lie outside
        torch.randn(*sizes, 2),
        torch.randn(sizes) * 3,
    )
    return Problem(*(x.to(device, dtype) if isinstance(x, Tensor) else x for x in problem))


def output_and_gradients(function, problem: Problem, grad_output: Tensor) -> list[Tensor]:
    """The output, then the gradients of value, offsets and logits."""
    leaves = [x.detach().clone().requires_grad_() for x in (problem.value, problem.offsets, problem.logits)]
    output = function(leaves[0], problem.shapes, problem.reference, *leaves[1:])
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def test_points_move_by_pixels_of_the_level() -> None:
    reference = torch.tensor([[[[0.5, 0.25], [0.1, 0.2]]]])  # one query, two levels
    offsets = torch.tensor([[[[[[2.0, -1.0]], [[1.0, 3.0]]]]]])  # one head, one point
    locations = sampling_locations_of(reference, offsets, [(4, 10), (5, 20)])
    torch.testing.assert_close(locations.flatten(), torch.tensor([0.5 + 0.2, 0.25 - 0.25, 0.1 + 0.05, 0.2 + 0.6]))


@on_points_and_boxes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_traced_call_computes_with_the_sizes_of_its_input(reference_size: int, dtype: torch.dtype) -> None:
    """Not with those of the example."""

    class OfAMap(torch.nn.Module):
        def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            return ms_deform_attn_fused(value.flatten(1, 2), [value.shape[1:3]], reference, offsets, logits)

    def arguments(height: int, width: int) -> tuple[Tensor, ...]:
        value, _, *sampling = make_problem(reference_size, [(height, width)], dtype=dtype)
        return value.unflatten(1, (height, width)), *sampling

    auto = torch.export.Dim.AUTO
    program = torch.export.export(OfAMap(), arguments(6, 8), dynamic_shapes=({1: auto, 2: auto}, None, None, None))
    other = arguments(9, 5)
    torch.testing.assert_close(program.module()(*other), OfAMap()(*other))


def test_boxes_move_by_shares_of_their_half_size() -> None:
    reference = torch.tensor([[[[0.5, 0.25, 0.2, 0.4]]]])
    offsets = torch.tensor([[[[[[2.0, -1.0], [4.0, 4.0]]]]]])  # two points
    locations = sampling_locations_of(reference, offsets, [(4, 10)])
    expected = [0.5 + 2 / 2 * 0.1, 0.25 - 1 / 2 * 0.2, 0.5 + 4 / 2 * 0.1, 0.25 + 4 / 2 * 0.2]
    torch.testing.assert_close(locations.flatten(), torch.tensor(expected))


@on_each_device
@on_points_and_boxes
@pytest.mark.parametrize(("shapes", "points"), [(PYRAMID, 4), (PYRAMID, 3), ([(5, 7)], 1), ([(4, 9)] * 5, 4)])
@pytest.mark.parametrize(("channels", "queries"), [(5, 9), (32, 9), (32, 300), (300, 300)])
def test_float64_equals_reference(
    shapes: list, points: int, channels: int, queries: int, reference_size: int, device: str
) -> None:
    problem = make_problem(reference_size, shapes, points, channels, queries, device=device)
    grad = torch.randn(2, queries, 2 * channels, dtype=torch.float64, device=device)
    ours = output_and_gradients(ms_deform_attn_fused, problem, grad)
    for result, truth in zip(ours, output_and_gradients(ms_deform_attn_fused_reference, problem, grad), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-10 * truth.abs().max().item())


@on_each_device
@on_points_and_boxes
def test_float32_is_as_accurate_as_the_separate_steps(reference_size: int, device: str) -> None:
    wide = make_problem(reference_size, points=4, channels=32, queries=300, device=device)
    narrow = Problem(*(x.float() if isinstance(x, Tensor) else x for x in wide))
    wide = Problem(*(x.double() if isinstance(x, Tensor) else x for x in narrow))
    grad = torch.randn(2, 300, 64, device=device)
    truth = output_and_gradients(ms_deform_attn_fused_reference, wide, grad)
    separate = output_and_gradients(ms_deform_attn_fused_reference, narrow, grad)
    for ours, theirs, exact in zip(
        output_and_gradients(ms_deform_attn_fused, narrow, grad), separate, truth, strict=True
    ):
        allowed = 2 * (theirs.double() - exact).norm() + 1e-7 * exact.norm()
        assert (ours.double() - exact).norm() <= allowed


@on_each_device
@on_points_and_boxes
@pytest.mark.parametrize("function", [ms_deform_attn_fused, ms_deform_attn_fused_reference])
@pytest.mark.parametrize("all_half", [False, True], ids=["half values", "all half"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_values_lose_no_more_than_their_rounding(
    dtype: torch.dtype, all_half: bool, function, reference_size: int, device: str
) -> None:
    problem = make_problem(reference_size, channels=32, queries=300, dtype=torch.float32, device=device)
    if all_half:
        problem = Problem(*(x.to(dtype) if isinstance(x, Tensor) else x for x in problem))
    problem = problem._replace(value=problem.value.to(dtype))
    result = function(*problem)
    truth = ms_deform_attn_fused_reference(*(x.float() if isinstance(x, Tensor) else x for x in problem))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5)


@on_each_device
@on_points_and_boxes
def test_gradcheck(reference_size: int, device: str) -> None:
    shapes = [(5, 3), (3, 2)]
    problem = make_problem(reference_size, shapes, points=1, channels=3, queries=2, device=device)
    if reference_size == POINT:
        # A quarter of a pixel from the kinks of bilinear interpolation, which are where offsets are half pixels.
        problem = problem._replace(
            reference=problem.reference.clone().fill_(0.5),
            offsets=(torch.randint(-3, 4, problem.offsets.shape, device=device) / 2 + 0.25).double(),
        )
    leaves = [x.requires_grad_() for x in (problem.value, problem.offsets, problem.logits)]
    assert torch.autograd.gradcheck(
        lambda value, offsets, logits: ms_deform_attn_fused(value, shapes, problem.reference, offsets, logits), leaves
    )


@on_points_and_boxes
def test_reference_that_needs_a_gradient_gets_it(reference_size: int) -> None:
    problem = make_problem(reference_size)
    gradients = []
    for function in (ms_deform_attn_fused, ms_deform_attn_fused_reference):
        reference = problem.reference.clone().requires_grad_()
        output = function(problem.value, problem.shapes, reference, problem.offsets, problem.logits)
        gradients.append(torch.autograd.grad(output.square().sum(), reference)[0])
    torch.testing.assert_close(*gradients)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@on_points_and_boxes
def test_opcheck(reference_size: int, dtype: torch.dtype, device: str) -> None:
    value, shapes, reference, offsets, logits = make_problem(reference_size, dtype=dtype, device=device)
    flat = [size for shape in shapes for size in shape]
    leaves = [x.requires_grad_() for x in (value, offsets, logits)]
    arguments = (leaves[0], flat, reference, *leaves[1:])
    torch.library.opcheck(torch.ops.dino_d2.ms_deform_attn_fused.default, arguments)
    detached = [value.detach(), flat, reference, offsets.detach(), logits.detach()]
    for wanted in ((True, True), (True, False), (False, True)):
        arguments = (torch.randn(2, 9, 16, dtype=dtype, device=device), *detached, *wanted, False)
        torch.library.opcheck(torch.ops.dino_d2.ms_deform_attn_fused_backward.default, arguments)


@on_each_device
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["value", "offsets", "logits", "value+logits"])
@pytest.mark.parametrize("queries", [9, 300])
def test_gradient_of_some_inputs_is_that_of_all(wanted: tuple[int, ...], queries: int, device: str) -> None:
    problem = make_problem(BOX, queries=queries, device=device)
    grad = torch.randn(2, queries, 16, device=device, dtype=torch.float64)
    expected = output_and_gradients(ms_deform_attn_fused, problem, grad)[1:]
    leaves = [problem.value, problem.offsets, problem.logits]
    chosen = [x.requires_grad_() for i, x in enumerate(leaves) if i in wanted]
    output = ms_deform_attn_fused(leaves[0], problem.shapes, problem.reference, *leaves[1:])
    for i, gradient in zip(wanted, torch.autograd.grad(output, chosen, grad), strict=True):
        torch.testing.assert_close(gradient, expected[i])


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_fused])
def test_values_are_not_kept_for_a_backward_that_does_not_read_them(function) -> None:
    value, shapes, reference, offsets, logits = make_problem(POINT)
    sampling = (None,) if function is ms_deform_attn else (reference,)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        function(value.requires_grad_(), shapes, *sampling, offsets, logits)
        assert value.shape not in kept
        function(value, shapes, *sampling, offsets.requires_grad_(), logits)
        assert value.shape in kept


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_may_be_as_large_as_they_like(dtype: torch.dtype, device: str) -> None:
    """Only their differences count, and the largest of them wins."""
    value, shapes, reference, offsets, logits = make_problem(POINT, points=4, dtype=dtype, device=device)
    expected = ms_deform_attn_fused(value, shapes, reference, offsets, logits)
    shifted = ms_deform_attn_fused(value, shapes, reference, offsets, logits + 1000)
    torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-3)
    logits = torch.full_like(logits, -1e30)
    logits[..., 1, 2] = 1e30
    weights = torch.zeros_like(logits)
    weights[..., 1, 2] = 1
    only = ms_deform_attn_reference(value, shapes, sampling_locations_of(reference, offsets, shapes), weights)
    torch.testing.assert_close(ms_deform_attn_fused(value, shapes, reference, offsets, logits), only)


@on_each_device
def test_nan_logit_is_not_hidden(device: str) -> None:
    problem = make_problem(POINT, device=device)
    problem.logits[0, 3, 1, 0, 0] = torch.nan
    result = ms_deform_attn_fused(*problem)
    truth = ms_deform_attn_fused_reference(*problem)
    assert torch.equal(result.isnan(), truth.isnan())
    assert result.isnan().any()


@on_each_device
@on_points_and_boxes
def test_box_of_no_size_and_far_reference_are_harmless(reference_size: int, device: str) -> None:
    problem = make_problem(reference_size, device=device)
    problem.reference[:, ::2] = 0
    problem.reference[:, 1, :, :2] = 1e20
    grad = torch.randn(2, 9, 16, dtype=torch.float64, device=device)
    ours = output_and_gradients(ms_deform_attn_fused, problem, grad)
    for result, truth in zip(ours, output_and_gradients(ms_deform_attn_fused_reference, problem, grad), strict=True):
        torch.testing.assert_close(result, truth)


@on_each_device
@pytest.mark.parametrize(("queries", "points"), [(0, 0), (0, 2), (9, 0)])
def test_empty_problem_has_empty_or_zero_result(queries: int, points: int, device: str) -> None:
    problem = make_problem(BOX, queries=queries, points=points, device=device)
    results = output_and_gradients(ms_deform_attn_fused, problem, torch.ones(2, queries, 16, device=device))
    assert results[0].shape == (2, queries, 16)
    assert not any(result.any() for result in results)


@on_each_device
def test_inputs_need_not_be_contiguous(device: str) -> None:
    value, shapes, *rest = make_problem(BOX, device=device)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, *rest)]
    result = ms_deform_attn_fused(strided[0], shapes, *strided[1:])
    torch.testing.assert_close(result, ms_deform_attn_fused(value, shapes, *rest))


@on_each_device
def test_autocast_leaves_precision_of_places_and_weights(device: str) -> None:
    problem = make_problem(BOX, dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(ms_deform_attn_fused(*problem), ms_deform_attn_fused_reference(*problem))
        halves = problem._replace(value=problem.value.bfloat16(), offsets=problem.offsets.bfloat16())
        assert ms_deform_attn_fused(*halves).dtype == torch.bfloat16


def wrong_arguments() -> list[tuple[str, dict]]:
    right = make_problem(POINT)
    return [
        ("value must be", {"value": right.value[0]}),
        ("value must be a floating", {"value": right.value.long()}),
        ("spatial_shapes .* add up to", {"shapes": [(6, 8), (3, 4), (2, 3)]}),
        ("sampling_offsets must be", {"offsets": right.offsets[..., 0]}),
        ("sampling_offsets .* must have batch", {"offsets": right.offsets[:1]}),
        ("attention_logits must be", {"logits": right.logits[..., :1]}),
        ("attention_logits must be a floating", {"logits": right.logits.long()}),
        ("reference must be", {"reference": right.reference[..., :1]}),
        ("reference must be", {"reference": right.reference[:, :4]}),
        ("reference must be a floating", {"reference": right.reference.long()}),
        ("reference is on meta", {"reference": right.reference.to("meta")}),
    ]


@pytest.mark.parametrize(("complaint", "change"), wrong_arguments())
def test_wrong_argument_is_named(complaint: str, change: dict) -> None:
    with pytest.raises(ValueError, match=complaint):
        ms_deform_attn_fused(*make_problem(POINT)._replace(**change))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_operator_itself_refuses_a_reference_that_would_leave_its_memory(size: int) -> None:
    value, shapes, reference, offsets, logits = make_problem(POINT)
    flat = [side for shape in shapes for side in shape]
    with pytest.raises(RuntimeError, match="reference must be"):
        torch.ops.dino_d2.ms_deform_attn_fused(
            value, flat, reference[..., :1].expand(-1, -1, -1, size), offsets, logits
        )


class Layer(torch.nn.Module):
    """The op between two other operations."""

    def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return ms_deform_attn_fused(value * 2, PYRAMID, reference.sigmoid(), offsets, logits) + 1


def test_compiles_without_a_graph_break() -> None:
    value, _, reference, offsets, logits = make_problem(BOX, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (value, offsets, logits)]
    expected = Layer()(value, reference, offsets, logits)
    result = torch.compile(Layer(), fullgraph=True, backend="aot_eager")(value, reference, offsets, logits)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(x.sum(), leaves) for x in (result, expected)]
    for ours, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth)


def test_exports_for_any_number_of_queries() -> None:
    value, _, *sampling = make_problem(BOX, dtype=torch.float32)
    queries = {1: torch.export.Dim("queries", min=2)}
    program = torch.export.export(Layer(), (value, *sampling), dynamic_shapes=(None, queries, queries, queries))
    assert "dino_d2.ms_deform_attn_fused.default" in [str(node.target) for node in program.graph.nodes]
    fewer = (value, *(x[:, :4].contiguous() for x in sampling))
    torch.testing.assert_close(program.module()(*fewer), Layer()(*fewer))
