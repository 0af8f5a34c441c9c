"""Count parameters, FLOPs and activations of each stage of a detector, with fvcore.

One multiply-add counts as one FLOP, as in fvcore and in DETR-like papers. Matrix products, convolutions, attention,
deformable attention and norms are counted. Elementwise operations, indexing and sorting are not: fvcore and detectron2
ignore most of them silently, the rest is listed in :attr:`Analysis.not_counted`. Tracing also drops unused outputs: the
class logits of all decoder layers but the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from fvcore.nn.jit_handles import generic_activation_jit, get_shape
from torch import nn

from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention

# Operators, and the index of the input with one weight per sample.
DEFORMABLE_ATTENTION = {"dino_d2::ms_deform_attn": 3, "dino_d2::ms_deform_attn_fused": 4}
ATTENTION = "aten::scaled_dot_product_attention"


@dataclass(frozen=True)
class Cost:
    """Cost of a stage. parameters: trainable or not. flops, activations: of one prediction; activations are the output
    sizes of the counted operators without norms."""

    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class Analysis:
    """Costs of a model. stages: by name, in execution order. total: of the whole model. not_counted: operators without
    a formula, and their number of calls."""

    stages: dict[str, Cost]
    total: Cost
    not_counted: dict[str, int]


def ms_deform_attn_flops(value: Sequence[int], weights: Sequence[int]) -> int:
    """Multiply-adds of `dino_d2.ops.ms_deform_attn`.

    Per sample and channel: four to interpolate between pixels and one to weight the result.

    Args:
        value: shape (B, S, heads, channels).
        weights: shape (B, Q, heads, L, points) of the attention weights, one per sample.
    """
    return 5 * prod(weights) * value[-1]


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Multiply-adds of scaled dot-product attention: query x key and weights x value.

    Args:
        query: shape (…, Q, channels).
        key: shape (…, K, channels).
        value: shape (…, K, channels of the result).
    """
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def analyze(model: nn.Module, height: int, width: int) -> Analysis:
    """Trace one prediction of a detector and count each stage, which is a child module with parameters.

    Args:
        model: takes detectron2's input format, list[dict].
        height, width: of the image, in pixels; the batch is one image without padding.
    """
    inputs = [{"image": torch.zeros(3, height, width)}]
    adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
    flops, activations = FlopCountAnalysis(model, inputs), ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    flops.set_op_handle(ATTENTION, lambda inputs, outputs: attention_flops(*(get_shape(x) for x in inputs[:3])))
    activations.set_op_handle(ATTENTION, generic_activation_jit())
    for operator, weights in DEFORMABLE_ATTENTION.items():
        flops.set_op_handle(operator, partial(_count_deformable_attention, weights))
        activations.set_op_handle(operator, generic_activation_jit())
    for count in (flops, activations):
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")

    def cost(name: str, module: nn.Module) -> Cost:
        return Cost(sum(p.numel() for p in module.parameters()), int(flops.total(name)), int(activations.total(name)))

    with _ready_to_trace(model):
        total = cost("model", model)
    stages = {name: cost(f"model.{name}", child) for name, child in model.named_children()}
    return Analysis(
        stages={name: stage for name, stage in stages.items() if stage.parameters},
        total=total,
        not_counted=dict(flops.unsupported_ops()),
    )


def as_table(analysis: Analysis, markdown: bool) -> str:
    """One line per stage and one for the total, in millions (M) and billions (G)."""
    rows = [["stage", "parameters (M)", "FLOPs (G)", "activations (M)"]]
    for name, cost in (*analysis.stages.items(), ("total", analysis.total)):
        numbers = (cost.parameters / 1e6, cost.flops / 1e9, cost.activations / 1e6)
        rows.append([name, *(f"{number:.2f}" for number in numbers)])
    if markdown:
        rows.insert(1, ["---", *["---:"] * 3])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _count_deformable_attention(weights: int, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    return ms_deform_attn_flops(get_shape(inputs[0]), get_shape(inputs[weights]))


@contextmanager
def _ready_to_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with map sizes converted to numbers: tracing turns them into tensors, which the op rejects."""

    def sizes_as_numbers(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        *others, memory = args
        return *others, replace(memory, spatial_shapes=tuple((int(h), int(w)) for h, w in memory.spatial_shapes))

    layers = [module for module in model.modules() if isinstance(module, MultiScaleDeformableAttention)]
    hooks = [layer.register_forward_pre_hook(sizes_as_numbers) for layer in layers]
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
