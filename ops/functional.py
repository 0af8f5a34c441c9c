"""Multi-scale deformable attention (arXiv 2010.04159, equation 3) on the compiled kernels.

`ms_deform_attn` takes locations and weights; `ms_deform_attn_fused` makes them inside, from what the layers predict.
Both choose: the compiled op where it has a kernel for the device, otherwise the plain PyTorch formulation, which says
so once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import compiled, warn_that_reference_serves
from .reference import attention_weights_of, ms_deform_attn_reference, sampling_locations_of


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    level_start_index: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of every feature level.

    Values outside a level are zero; a location of 0 is the outer edge of the first pixel, 1 that of the last
    (`align_corners=False`).

    Args:
        value: (B, S, heads, channels), S tokens level by level in raster order. float32, float64, bfloat16 or
            float16.
        spatial_shapes: (height, width) of each of the L levels. A sequence of pairs is best: it stays on the
            host and can be traced. A CPU tensor (L, 2) is taken too; a tensor on another device is read back,
            which waits for that device.
        level_start_index: first token of each level. It follows from `spatial_shapes`; given, it must agree.
        sampling_locations: (B, Q, heads, L, points, 2) as (x, y), [0, 1] inside the level.
        attention_weights: (B, Q, heads, L, points).

    Sampling and summing are done in float32 (float64 for float64 values) whatever `value` is stored as, under
    autocast too: locations and weights are converted to that precision, the result has the dtype of `value`.

    Returns:
        (B, Q, heads * channels), in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit together, with the argument's name.
    """
    shapes = _shapes_on_host(spatial_shapes)
    _check(value, shapes, level_start_index, sampling_locations, attention_weights)
    accumulate = _accumulation_dtype(value)
    locations, weights = sampling_locations.to(accumulate), attention_weights.to(accumulate)
    if value.device.type == "cpu" and value.dtype == torch.float16:
        # No float16 arithmetic on most processors, and no kernel: the detour is exact but for the last rounding.
        return ms_deform_attn(value.float(), shapes, None, locations, weights).to(value.dtype)
    if not compiled(value.device.type):
        warn_that_reference_serves(value.device.type)
        return ms_deform_attn_reference(value.to(accumulate), shapes, locations, weights).to(value.dtype)
    return torch.ops.dino_d2.ms_deform_attn(value, _flat(shapes), locations, weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` with the sampling locations and the softmax inside: neither is ever stored.

    Args:
        value: (B, S, heads, channels), as in :func:`ms_deform_attn`.
        spatial_shapes: (height, width) of each of the L levels, as there.
        reference: (B, Q, L, 2) points, or (B, Q, L, 4) boxes cx, cy, w, h; in [0, 1] of the level.
        sampling_offsets: (B, Q, heads, L, points, 2) as (x, y); from a point in pixels of the level, from the centre
            of a box in units of its half size divided by the number of points.
        attention_logits: (B, Q, heads, L, points); the softmax goes over levels and points.

    Locations, softmax and sums are in float32 (float64 for float64 values), under autocast too. Without
    compiled kernels, for float16 on a CPU, and for a reference that needs a gradient, the separate steps give the same
    result.

    Returns:
        (B, Q, heads * channels), in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit together, with the argument's name.
    """
    shapes = _shapes_on_host(spatial_shapes)
    _check_value(value, shapes)
    _check_sampling(value, shapes, sampling_offsets, attention_logits, ("sampling_offsets", "attention_logits"))
    _check_reference(value, sampling_offsets, reference)
    accumulate = _accumulation_dtype(value)
    reference, offsets, logits = (tensor.to(accumulate) for tensor in (reference, sampling_offsets, attention_logits))
    differentiates_reference = torch.is_grad_enabled() and reference.requires_grad
    device = value.device.type
    if not compiled(device) or differentiates_reference or (device == "cpu" and value.dtype == torch.float16):
        locations = sampling_locations_of(reference, offsets, shapes)
        return ms_deform_attn(value, shapes, None, locations, attention_weights_of(logits))
    return torch.ops.dino_d2.ms_deform_attn_fused(value, _flat(shapes), reference, offsets, logits)


def _flat(shapes: list[tuple[int, int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


def _shapes_on_host(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(height, width) for height, width in pairs]


def _check(
    value: Tensor,
    shapes: list[tuple[int, int]],
    level_start_index: Sequence[int] | Tensor | None,
    locations: Tensor,
    weights: Tensor,
) -> None:
    starts = _check_value(value, shapes)
    _check_sampling(value, shapes, locations, weights, ("sampling_locations", "attention_weights"))
    if level_start_index is not None:
        given = level_start_index.tolist() if isinstance(level_start_index, Tensor) else list(level_start_index)
        if given != starts:
            raise ValueError(f"level_start_index is {given}, spatial_shapes {shapes} make it {starts}")


def _check_value(value: Tensor, shapes: list[tuple[int, int]]) -> list[int]:
    """The first token of each level."""
    if value.dim() != 4:
        raise ValueError(f"value must be (batch, tokens, heads, channels), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"value must be a floating point tensor, got {value.dtype}")
    starts = [0]
    for height, width in shapes:
        if height < 1 or width < 1:
            raise ValueError(f"spatial_shapes {shapes}: every level must have at least one pixel")
        starts.append(starts[-1] + height * width)
    if starts[-1] != value.shape[1]:
        raise ValueError(f"spatial_shapes {shapes} add up to {starts[-1]} tokens, value has {value.shape[1]}")
    return starts[:-1]


def _check_sampling(
    value: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor, names: tuple[str, str]
) -> None:
    batch, _, heads, _ = value.shape
    if positions.dim() != 6 or positions.shape[-1] != 2:
        raise ValueError(f"{names[0]} must be (batch, queries, heads, levels, points, 2), got {tuple(positions.shape)}")
    if (positions.shape[0], *positions.shape[2:4]) != (batch, heads, len(shapes)):
        raise ValueError(
            f"{names[0]} {tuple(positions.shape)} must have batch {batch} and heads {heads} like value, "
            f"and {len(shapes)} levels like spatial_shapes"
        )
    if weights.shape != positions.shape[:-1]:
        raise ValueError(
            f"{names[1]} must be {tuple(positions.shape[:-1])} like {names[0]}, got {tuple(weights.shape)}"
        )
    for name, tensor in zip(names, (positions, weights), strict=True):
        _check_floating_beside(value, tensor, name)


def _check_reference(value: Tensor, offsets: Tensor, reference: Tensor) -> None:
    expected = (offsets.shape[0], offsets.shape[1], offsets.shape[3])
    if reference.dim() != 4 or reference.shape[:3] != expected or reference.shape[3] not in (2, 4):
        raise ValueError(f"reference must be {expected} and 2 or 4 numbers, got {tuple(reference.shape)}")
    _check_floating_beside(value, reference, "reference")


def _check_floating_beside(value: Tensor, tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")


def _accumulation_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# What torch has to know of the two operators. `sampling` stands for the tensors behind spatial_shapes: locations and
# weights; or reference, offsets and logits. The last two of them have gradients.


def _forward_fake(value: Tensor, spatial_shapes: Sequence[int], *sampling: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling[-1].shape[1], heads * channels)


def _backward_fake(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *sampling_and_wanted: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    *_, positions, weights, value_wanted, sampling_wanted, _ = sampling_and_wanted
    return (
        value.new_empty(value.shape if value_wanted else (0,), dtype=_accumulation_dtype(value)),
        positions.new_empty(positions.shape if sampling_wanted else (0,)),
        weights.new_empty(weights.shape if sampling_wanted else (0,)),
    )


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, *sampling = inputs
    ctx.value_shape, ctx.value_dtype = value.shape, value.dtype
    # The gradient of the value does not depend on the value.
    ctx.save_for_backward(value if any(ctx.needs_input_grad[2:]) else None, *sampling)


def _second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ms_deform_attn has no second derivative; differentiate dino_d2.ops.ms_deform_attn_reference instead"
    )


def _register(name: str) -> None:
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, *sampling = ctx.saved_tensors
        value_wanted, _, *_, positions_wanted, weights_wanted = ctx.needs_input_grad
        if value is None:  # its shape alone is read
            value = grad_output.new_empty((), dtype=ctx.value_dtype).expand(ctx.value_shape)
        grad_value, grad_positions, grad_weights = getattr(torch.ops.dino_d2, f"{name}_backward")(
            grad_output,
            value,
            ctx.spatial_shapes,
            *sampling,
            value_wanted,
            positions_wanted or weights_wanted,
            torch.are_deterministic_algorithms_enabled(),
        )
        return (
            grad_value.to(ctx.value_dtype) if value_wanted else None,
            *[None] * (len(sampling) - 1),  # the shapes and, if there is one, the reference
            grad_positions if positions_wanted else None,
            grad_weights if weights_wanted else None,
        )

    torch.library.register_fake(f"dino_d2::{name}", _forward_fake)
    torch.library.register_fake(f"dino_d2::{name}_backward", _backward_fake)
    torch.library.register_autograd(f"dino_d2::{name}", backward, setup_context=_setup_context)
    torch.library.register_autograd(f"dino_d2::{name}_backward", _second_derivative)


if compiled():
    for _name in ("ms_deform_attn", "ms_deform_attn_fused"):
        _register(_name)
