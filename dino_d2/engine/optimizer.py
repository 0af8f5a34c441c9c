"""DINO's AdamW; detectron2 builds only SGD."""

from __future__ import annotations

from collections.abc import Iterable

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
    clip = s.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE != CLIP_WHOLE_MODEL:
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, s.BASE_LR)
    if clip.ENABLED:
        return ClippedAdamW(params, s.BASE_LR, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    return torch.optim.AdamW(params, s.BASE_LR, fused=True)


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
