"""Multi-scale deformable attention (arXiv 2010.04159, equation 3) with compiled kernels.

`ms_deform_attn` takes sampling locations and weights; `ms_deform_attn_fused` computes them from offsets and logits.
Both use the compiled op if it has a kernel for the device, otherwise plain PyTorch with a single warning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import compiled, warn_about_fallback
from .reference import accumulation_dtype, attention_weights_of, ms_deform_attn_reference, sampling_locations_of


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    level_start_index: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples from all feature levels.

    Values outside a level are zero; a location of 0 is the outer edge of the first pixel, 1 that of the last
    (`align_corners=False`).

    Args:
        value: (B, S, heads, channels), S tokens level by level in raster order. float32, float64, bfloat16 or
            float16.
        spatial_shapes: (height, width) of each of the L levels. Prefer a sequence of pairs, which is traceable. Tensors
            (L, 2) are accepted too; one on another device than the CPU causes a synchronisation.
        level_start_index: first token of each level; optional, but must agree with `spatial_shapes`.
        sampling_locations: (B, Q, heads, L, points, 2) as (x, y), [0, 1] inside the level.
        attention_weights: (B, Q, heads, L, points).

    Sampling and summing use float32 (float64 for float64 values) for every dtype of `value`, also under autocast:
    locations and weights are converted to that precision, the result has the dtype of `value`.

    Returns:
        (B, Q, heads * channels), in the dtype of `value`.

    Raises:
        ValueError: inconsistent shapes; the message names the argument.
    """
    shapes = _shapes_on_host(spatial_shapes)
    _check(value, shapes, level_start_index, sampling_locations, attention_weights)
    if not compiled(value.device.type):
        warn_about_fallback(value.device.type)
        return ms_deform_attn_reference(value, shapes, sampling_locations, attention_weights)
    accumulate = accumulation_dtype(value)
    locations, weights = sampling_locations.to(accumulate), attention_weights.to(accumulate)
    if value.device.type == "cpu" and value.dtype == torch.float16:
        # Most CPUs have no float16 arithmetic, and there is no kernel: float32 differs only in the final rounding.
        return ms_deform_attn(value.float(), shapes, None, locations, weights).to(value.dtype)
    return torch.ops.dino_d2.ms_deform_attn(value, _flat(shapes), locations, weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` fused with the computation of locations and softmax, which are never stored.

    Args:
        value: (B, S, heads, channels), as in :func:`ms_deform_attn`.
        spatial_shapes: (height, width) of each of the L levels, as in :func:`ms_deform_attn`.
        reference: (B, Q, L, 2) points, or (B, Q, L, 4) boxes cx, cy, w, h; in [0, 1] of the level.
        sampling_offsets: (B, Q, heads, L, points, 2) as (x, y): for points in pixels of the level, for boxes relative
            to the centre in units of half the size divided by the number of points.
        attention_logits: (B, Q, heads, L, points); softmax over levels and points.

    Locations, softmax and sums use float32 (float64 for float64 values), also under autocast. Without compiled kernels,
    for float16 on a CPU, and if the reference requires gradients, the steps run separately, with the same result.

    Returns:
        (B, Q, heads * channels), in the dtype of `value`.

    Raises:
        ValueError: inconsistent shapes; the message names the argument.
    """
    shapes = _shapes_on_host(spatial_shapes)
    _check_value(value, shapes)
    _check_sampling(value, shapes, sampling_offsets, attention_logits, ("sampling_offsets", "attention_logits"))
    _check_reference(value, sampling_offsets, reference)
    accumulate = accumulation_dtype(value)
    device, reference = value.device.type, reference.to(accumulate)
    differentiates_reference = torch.is_grad_enabled() and reference.requires_grad
    separate = not compiled(device) or differentiates_reference or (device == "cpu" and value.dtype == torch.float16)
    offsets, logits = sampling_offsets, attention_logits
    if separate or device == "cpu" or not offsets.dtype == logits.dtype == value.dtype:  # which CUDA kernels read
        offsets, logits = offsets.to(accumulate), logits.to(accumulate)
    if separate:
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
            raise ValueError(f"level_start_index is {given}, but spatial_shapes {shapes} give {starts}")


def _check_value(value: Tensor, shapes: list[tuple[int, int]]) -> list[int]:
    """Check `value` and return the first token of each level."""
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
        _check_dtype_and_device(value, tensor, name)


def _check_reference(value: Tensor, offsets: Tensor, reference: Tensor) -> None:
    expected = (offsets.shape[0], offsets.shape[1], offsets.shape[3])
    if reference.dim() != 4 or reference.shape[:3] != expected or reference.shape[3] not in (2, 4):
        raise ValueError(f"reference must be {expected} and 2 or 4 numbers, got {tuple(reference.shape)}")
    _check_dtype_and_device(value, reference, "reference")


def _check_dtype_and_device(value: Tensor, tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")


# Registration of the two operators. `sampling` are the tensors after spatial_shapes: locations and weights; or
# reference, offsets and logits. The last two have gradients.


def _forward_fake(value: Tensor, spatial_shapes: Sequence[int], *sampling: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling[-1].shape[1], heads * channels)


def _backward_fake(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *sampling_and_needs_grad: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    *_, positions, weights, value_needs_grad, sampling_needs_grad, _ = sampling_and_needs_grad
    return (
        value.new_empty(value.shape if value_needs_grad else (0,), dtype=accumulation_dtype(value)),
        positions.new_empty(positions.shape if sampling_needs_grad else (0,)),
        weights.new_empty(weights.shape if sampling_needs_grad else (0,)),
    )


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, *sampling = inputs
    ctx.value_shape, ctx.value_dtype = value.shape, value.dtype
    # The gradient of the value does not depend on the value.
    ctx.save_for_backward(value if any(ctx.needs_input_grad[2:]) else None, *sampling)


def _second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ms_deform_attn has no second derivative; use dino_d2.ops.ms_deform_attn_reference instead"
    )


def _register(name: str) -> None:
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, *sampling = ctx.saved_tensors
        value_needs_grad, _, *_, positions_need_grad, weights_need_grad = ctx.needs_input_grad
        if value is None:  # only its shape is used
            value = grad_output.new_empty((), dtype=ctx.value_dtype).expand(ctx.value_shape)
        grad_value, grad_positions, grad_weights = getattr(torch.ops.dino_d2, f"{name}_backward")(
            grad_output,
            value,
            ctx.spatial_shapes,
            *sampling,
            value_needs_grad,
            positions_need_grad or weights_need_grad,
            torch.are_deterministic_algorithms_enabled(),
        )
        return (
            grad_value.to(ctx.value_dtype) if value_needs_grad else None,
            *[None] * (len(sampling) - 1),  # spatial_shapes and, if present, the reference
            grad_positions if positions_need_grad else None,
            grad_weights if weights_need_grad else None,
        )

    torch.library.register_fake(f"dino_d2::{name}", _forward_fake)
    torch.library.register_fake(f"dino_d2::{name}_backward", _backward_fake)
    torch.library.register_autograd(f"dino_d2::{name}", backward, setup_context=_setup_context)
    torch.library.register_autograd(f"dino_d2::{name}_backward", _second_derivative)


if compiled():
    for _name in ("ms_deform_attn", "ms_deform_attn_fused"):
        _register(_name)
