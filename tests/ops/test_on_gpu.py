"""What only a GPU can show: streams, devices, graphs, sizes, determinism. The rest of tests/ops runs there too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dino_d2.ops import ms_deform_attn, ms_deform_attn_fused, ms_deform_attn_fused_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PYRAMID = [(20, 30), (10, 15), (5, 8), (3, 4)]
TOKENS = sum(height * width for height, width in PYRAMID)
# Of every layout of the kernels, and of none.
HEAD_SIZES = [4, 12, 16, 20, 32, 64, 128, 256, 300]


def make_inputs(
    channels: int = 32, queries: int = TOKENS, dtype: torch.dtype = torch.float32, device: str = "cuda"
) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, Tensor]:
    """Value, shapes, reference boxes, offsets, logits."""
    sizes = (2, queries, 4, len(PYRAMID), 4)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        torch.randn(2, TOKENS, 4, channels).to(device, dtype),
        PYRAMID,
        torch.rand(2, queries, len(PYRAMID), 4).to(device, accumulate),
        torch.randn(*sizes, 2).to(device, accumulate),
        torch.randn(sizes).to(device, accumulate),
    )


def output_and_gradients(function, inputs: tuple) -> list[Tensor]:
    value, shapes, reference, offsets, logits = inputs
    leaves = [x.detach().clone().requires_grad_() for x in (value, offsets, logits)]
    output = function(leaves[0], shapes, reference, *leaves[1:])
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]


@pytest.mark.parametrize("queries", [37, TOKENS])
@pytest.mark.parametrize("channels", HEAD_SIZES)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    ids=["float32", "float64", "float16", "bfloat16"],
)
def test_error_is_at_most_twice_that_of_the_reference(dtype: torch.dtype, channels: int, queries: int) -> None:
    inputs = make_inputs(channels, queries, dtype)
    exact = [x.double() if isinstance(x, Tensor) else x for x in inputs]
    truth = output_and_gradients(ms_deform_attn_fused_reference, exact)
    # The reference samples in the dtype of its locations, which no one would make half.
    wide = [x.float() if isinstance(x, Tensor) and dtype != torch.float64 else x for x in inputs]
    baseline = [x.to(dtype) for x in output_and_gradients(ms_deform_attn_fused_reference, wide)]
    # Where the truth is float64 too, the reference has no error, and another order of sums is all that there is.
    roundings = 16 if dtype == torch.float64 else 4
    for ours, theirs, expected in zip(output_and_gradients(ms_deform_attn_fused, inputs), baseline, truth, strict=True):
        allowed = 2 * (theirs.double() - expected).norm() + roundings * torch.finfo(dtype).eps * expected.norm()
        assert (ours.double() - expected).norm() <= allowed


def test_on_another_stream() -> None:
    inputs = make_inputs()
    expected = ms_deform_attn_fused(*inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # who does not queue behind this reads zeros
        value = inputs[0] * 1
        result = ms_deform_attn_fused(value, *inputs[1:])
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one() -> None:
    here = make_inputs(queries=5)
    there = tuple(x.to("cuda:1") if isinstance(x, Tensor) else x for x in here)
    with torch.cuda.device(0):
        for expected, result in zip(
            output_and_gradients(ms_deform_attn_fused, here),
            output_and_gradients(ms_deform_attn_fused, there),
            strict=True,
        ):
            torch.testing.assert_close(result.to("cuda:0"), expected)


def test_forward_and_backward_in_a_graph() -> None:
    value, shapes, reference, offsets, logits = make_inputs(queries=50)
    leaves = [x.requires_grad_() for x in (value, offsets, logits)]

    def step() -> tuple[Tensor, ...]:
        output = ms_deform_attn_fused(leaves[0], shapes, reference, *leaves[1:])
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        value.copy_(torch.randn_like(value))
    graph.replay()
    for result, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_more_numbers_than_32_bits_count() -> None:
    height, width = 4096, 2100  # times 256 channels: 2.2e9 numbers, 4.4 GB; sums in float32 twice that
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of memory")
    value = torch.zeros(1, height * width, 8, 32, device="cuda", dtype=torch.bfloat16)
    value[0, -1] = 3
    locations = torch.ones(1, 2, 8, 1, 1, 2, device="cuda")
    locations[..., 0] -= 0.5 / width
    locations[..., 1] -= 0.5 / height  # the middle of the last pixel
    weights = torch.ones(1, 2, 8, 1, 1, device="cuda")
    output = ms_deform_attn(value.requires_grad_(), [(height, width)], None, locations, weights)
    torch.testing.assert_close(output, torch.full_like(output, 3), rtol=0.02, atol=0)
    (gradient,) = torch.autograd.grad(output.sum(), value)
    torch.testing.assert_close(gradient[0, -1], torch.full_like(gradient[0, -1], 2), rtol=0.02, atol=0)


@pytest.mark.parametrize("function", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_on_request(dtype: torch.dtype, function: str) -> None:
    value, shapes, reference, offsets, logits = make_inputs(dtype=dtype)

    def call(value: Tensor, shapes: list, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        if function == "fused":
            return ms_deform_attn_fused(value, shapes, reference, offsets, logits)
        return ms_deform_attn(value, shapes, None, offsets.sigmoid(), logits)

    inputs = (value, shapes, reference, offsets, logits)
    expected = output_and_gradients(call, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (output_and_gradients(call, inputs) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    for result, truth in zip(first, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [32, 64])  # with and without a kernel that reads 16 bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_and_logits_in_16_bits(dtype: torch.dtype, channels: int, deterministic: bool) -> None:
    value, shapes, reference, offsets, logits = make_inputs(channels, dtype=dtype)
    narrow = (value, shapes, reference, offsets.to(dtype), logits.to(dtype))
    wide = (value, shapes, reference, *(x.float() for x in narrow[3:]))
    torch.use_deterministic_algorithms(deterministic)
    try:
        results, expected = (output_and_gradients(ms_deform_attn_fused, inputs) for inputs in (narrow, wide))
    finally:
        torch.use_deterministic_algorithms(False)
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result, truth.to(dtype), rtol=1e-2, atol=1e-4)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, where no multiple of 16 bytes is."""
    result = tensor.new_empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor)
    assert result.data_ptr() % 16 != 0
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", ["value", "offsets", "logits", "gradient"])
def test_tensors_may_begin_anywhere_in_memory(moved: str, dtype: torch.dtype) -> None:
    value, shapes, reference, offsets, logits = make_inputs(queries=20, dtype=dtype)
    tensors = {"value": value, "offsets": offsets, "logits": logits}
    tensors["gradient"] = torch.randn(2, 20, 4 * 32, device="cuda").to(dtype)
    results = []
    for case in (tensors, {**tensors, moved: shifted(tensors[moved])}):
        *leaves, gradient = (tensor.detach() for tensor in case.values())  # no copies, which would be aligned
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = ms_deform_attn_fused(leaves[0], shapes, reference, *leaves[1:])
        results.append([output, *torch.autograd.grad(output, leaves, gradient)])
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
