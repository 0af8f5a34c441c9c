"""AdamW as DINO is trained with it; detectron2 builds SGD only."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

CLIP_WHOLE_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the backbone's own learning rate and the clipping of `SOLVER.CLIP_GRADIENTS`.

    `CLIP_TYPE: full_model` scales all gradients together, so that their total norm is at most `CLIP_VALUE`; it
    records that norm as `grad_norm`. detectron2's types, `value` and `norm`, work on each parameter by itself.
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
    optimizer = torch.optim.AdamW(params, s.BASE_LR, fused=True)
    if clip.ENABLED:
        clip_total_norm(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def clip_total_norm(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> None:
    """Clip the norm of all gradients together before each step (after a gradient scaler has unscaled them)."""

    def clip(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        total = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        if has_event_storage():
            get_event_storage().put_scalar("grad_norm", total.item())

    optimizer.register_step_pre_hook(clip)
