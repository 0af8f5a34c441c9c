"""What to know of a step whose loss is infinite or not a number, written down before anything is lost."""

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
    """All tensors in nested sequences, dicts and dataclasses."""
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
    """Run the model on the batch once more and name the first module that puts out something that is not finite.

    Without the criterion, which counts boxes over all processes and would wait for them.
    Boxes of proposals that cannot be chosen are infinite on purpose; they never leave the module that makes them.
    """
    found: list[str] = []

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and not is_finite(output):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.training_outputs(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def write_report(
    folder: str, iteration: int, rank: int, model: DINO, batch: list[dict], losses: dict[str, Tensor]
) -> Path:
    """`non_finite_ITERATION_RANK.json`: images, losses, the first module and parameter that are not finite."""
    parameter = next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)
    report = {
        "iteration": iteration,
        "images": [{"image_id": x.get("image_id"), "file_name": x.get("file_name")} for x in batch],
        "losses": {name: str(value.item()) for name, value in losses.items()},
        "first_parameter": parameter,
        "first_module": first_non_finite_module(model, batch),
    }
    path = Path(folder, f"non_finite_{iteration:07d}_{rank}.json")
    path.write_text(json.dumps(report, indent=2))
    return path
