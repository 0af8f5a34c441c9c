"""DINO's AdamW; detectron2 builds only SGD."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn

CLIP_WHOLE_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a separate learning rate for the backbone and the clipping of `SOLVER.CLIP_GRADIENTS`.

    `CLIP_TYPE: full_model` clips the total norm of all gradients (:class:`ClippedAdamW`); detectron2's types `value`
    and `norm` clip each parameter separately.
    """
    s = cfg.SOLVER

    def lr_factor(name: str) -> float:
        return s.BACKBONE_MULTIPLIER if name.startswith("backbone.") else 1.0

    params = get_default_optimizer_params(
        model,
        base_lr=s.BASE_LR,
        weight_decay=s.WEIGHT_DECAY,
        weight_decay_norm=s.WEIGHT_DECAY_NORM,
        bias_lr_factor=s.BIAS_LR_FACTOR,
        weight_decay_bias=s.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in params:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    clip = s.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE != CLIP_WHOLE_MODEL:
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, s.BASE_LR)
    if clip.ENABLED:
        return ClippedAdamW(params, s.BASE_LR, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    return torch.optim.AdamW(params, s.BASE_LR, fused=True)


def resume_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of every parameter and its current learning rate; log all other settings that differ and keep the
    optimizer's own, which are the config's.

    Args:
        saved: a `state_dict`. With names of parameters it may group them differently, as other settings do.

    Raises:
        ValueError: it has other parameters, or without their names other groups.
    """
    groups = optimizer.state_dict()["param_groups"]
    named = all("param_names" in group for group in [*groups, *saved["param_groups"]])
    now, then = _places(groups, named), _places(saved["param_groups"], named)
    if now.keys() != then.keys():
        raise ValueError(
            "The checkpoint's optimizer has other parameters or groups its parameters differently. Set those of "
            "SOLVER.BACKBONE_MULTIPLIER, SOLVER.WEIGHT_DECAY_NORM, SOLVER.WEIGHT_DECAY_BIAS and SOLVER.BIAS_LR_FACTOR "
            "that you changed as before"
        )
    changes = Counter(
        (key, then[parameter][0][key], group[key])
        for parameter, (group, _) in now.items()
        for key in group.keys() & then[parameter][0].keys() - {"params", "param_names", "lr"}
        if group[key] != then[parameter][0][key]
    )
    for (key, old, new), count in sorted(changes.items(), key=str):
        logging.getLogger(__name__).info("%s of %d parameters was %s, is now %s", key, count, old, new)
    for parameter, (group, _) in now.items():
        group.setdefault("initial_lr", group["lr"])  # detectron2 makes some schedulers only when training starts
        group["lr"] = then[parameter][0]["lr"]
    numbers = {number: then[parameter][1] for parameter, (_, number) in now.items()}
    state = {ours: saved["state"][theirs] for ours, theirs in numbers.items() if theirs in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _places(groups: Sequence[dict], named: bool) -> dict[object, tuple[dict, int]]:
    """Group and number of each parameter of a `state_dict`, by its name or else by its place in the groups."""
    return {
        group["param_names"][i] if named else (place, i): (group, number)
        for place, group in enumerate(groups)
        for i, number in enumerate(group["params"])
    }


class ClippedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips the total gradient norm before each step.

    Args:
        params, lr: see AdamW.
        max_norm: limit on the norm of all gradients together.
        norm_type: 2 for the Euclidean norm.
    """

    def __init__(self, params: Iterable, lr: float, *, max_norm: float, norm_type: float):
        super().__init__(params, lr, fused=True)
        self.max_norm, self.norm_type = max_norm, norm_type
        self._norm: Tensor | None = None

    def clip(self) -> Tensor:
        """Clip the gradients for the next step; `step` calls this if it has not been called. Unscale them first.

        Returns:
            () the total norm before clipping, on the gradients' device; not finite if a gradient is not.
        """
        if self._norm is None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self._norm = nn.utils.clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        return self._norm

    def step(self) -> None:
        self.clip()
        self._norm = None
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._norm = None  # gradients discarded without a step
        super().zero_grad(set_to_none)
