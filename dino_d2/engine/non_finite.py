"""Report on a training step with an infinite or NaN loss or gradient."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_d2.meta_arch import DINO


def tensors_in(x: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested sequences, dicts and dataclasses."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from tensors_in(value)
    elif isinstance(x, Sequence) and not isinstance(x, str):
        for value in x:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(x):
        yield from tensors_in([getattr(x, field.name) for field in dataclasses.fields(x)])


def is_finite(x: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors_in(x) if t.is_floating_point())


def first_non_finite_module(model: DINO, batch: list[dict]) -> str | None:
    """Run the model on the batch again and return the name of the first module with a non-finite output.

    Skips the criterion, which would wait for other processes to count boxes. Invalid proposals have infinite boxes on
    purpose; these never leave their module.
    """
    found: list[str] = []

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and not is_finite(output):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.training_outputs(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def write_report(
    folder: str,
    iteration: int,
    rank: int,
    model: DINO,
    batch: list[dict],
    losses: dict[str, Tensor],
    grad_norm: float | None,
) -> Path:
    """Write `non_finite_ITERATION_RANK.json`: images, losses, gradient norm, first non-finite module and parameter."""
    parameter = next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)
    report = {
        "iteration": iteration,
        "images": [{"image_id": x.get("image_id"), "file_name": x.get("file_name")} for x in batch],
        "losses": {name: str(value.item()) for name, value in losses.items()},
        "grad_norm": None if grad_norm is None else str(grad_norm),
        "first_parameter": parameter,
        "first_module": first_non_finite_module(model, batch),
    }
    path = Path(folder, f"non_finite_{iteration:07d}_{rank}.json")
    path.write_text(json.dumps(report, indent=2))
    return path
