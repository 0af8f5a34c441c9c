"""Multi-scale deformable attention (arXiv 2010.04159, equation 3) on the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import compiled, warn_that_reference_serves
from .reference import ms_deform_attn_reference


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
    if not compiled():
        warn_that_reference_serves()
        return ms_deform_attn_reference(value.to(accumulate), shapes, locations, weights).to(value.dtype)
    flat_shapes = [size for shape in shapes for size in shape]
    return torch.ops.dino_d2.ms_deform_attn(value, flat_shapes, locations, weights)


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
    if value.dim() != 4:
        raise ValueError(f"value must be (batch, tokens, heads, channels), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"value must be a floating point tensor, got {value.dtype}")
    batch, tokens, heads, _ = value.shape
    if locations.dim() != 6 or locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations must be (batch, queries, heads, levels, points, 2), got {tuple(locations.shape)}"
        )
    if (locations.shape[0], *locations.shape[2:4]) != (batch, heads, len(shapes)):
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} must have batch {batch} and heads {heads} like value, "
            f"and {len(shapes)} levels like spatial_shapes"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be {tuple(locations.shape[:-1])} like sampling_locations, "
            f"got {tuple(weights.shape)}"
        )
    starts = [0]
    for height, width in shapes:
        if height < 1 or width < 1:
            raise ValueError(f"spatial_shapes {shapes}: every level must have at least one pixel")
        starts.append(starts[-1] + height * width)
    if starts[-1] != tokens:
        raise ValueError(f"spatial_shapes {shapes} add up to {starts[-1]} tokens, value has {tokens}")
    if level_start_index is not None:
        given = level_start_index.tolist() if isinstance(level_start_index, Tensor) else list(level_start_index)
        if given != starts[:-1]:
            raise ValueError(f"level_start_index is {given}, spatial_shapes {shapes} make it {starts[:-1]}")
    for name, tensor in (("sampling_locations", locations), ("attention_weights", weights)):
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")


def _accumulation_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _forward_fake(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_wanted: bool,
    sampling_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulation_dtype(value)
    return (
        value.new_empty(value.shape if value_wanted else (0,), dtype=dtype),
        sampling_locations.new_empty(sampling_locations.shape if sampling_wanted else (0,)),
        attention_weights.new_empty(attention_weights.shape if sampling_wanted else (0,)),
    )


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    value_wanted, _, locations_wanted, weights_wanted = ctx.needs_input_grad
    grad_value, grad_locations, grad_weights = torch.ops.dino_d2.ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        sampling_locations,
        attention_weights,
        value_wanted,
        locations_wanted or weights_wanted,
    )
    return (
        grad_value.to(value.dtype) if value_wanted else None,
        None,
        grad_locations if locations_wanted else None,
        grad_weights if weights_wanted else None,
    )


def _second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ms_deform_attn has no second derivative; differentiate dino_d2.ops.ms_deform_attn_reference instead"
    )


if compiled():
    torch.library.register_fake("dino_d2::ms_deform_attn", _forward_fake)
    torch.library.register_fake("dino_d2::ms_deform_attn_backward", _backward_fake)
    torch.library.register_autograd("dino_d2::ms_deform_attn", _backward, setup_context=_setup_context)
    torch.library.register_autograd("dino_d2::ms_deform_attn_backward", _second_derivative)
