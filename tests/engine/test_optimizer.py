from __future__ import annotations

import pytest
import torch
from torch import nn

from dino_d2.engine import build_optimizer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def loss(self, scale: float) -> torch.Tensor:
        return scale * self.decoder(self.backbone(torch.ones(2, 3))).pow(2).sum()


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_backbone_learns_at_its_own_rate_and_norms_and_biases_decay(tiny_cfg) -> None:
    model = Model()
    optimizer = build_optimizer(tiny_cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert group_of(optimizer, model.backbone.weight)["lr"] == pytest.approx(1e-5)
    assert group_of(optimizer, model.decoder[0].weight)["lr"] == pytest.approx(1e-4)
    for parameter in model.parameters():
        assert group_of(optimizer, parameter)["weight_decay"] == 1e-4


def test_weight_decay_of_norms_can_differ(tiny_cfg) -> None:
    tiny_cfg.SOLVER.WEIGHT_DECAY_NORM = 0.0
    model = Model()
    optimizer = build_optimizer(tiny_cfg, model)
    assert group_of(optimizer, model.decoder[1].weight)["weight_decay"] == 0
    assert group_of(optimizer, model.decoder[0].weight)["weight_decay"] == 1e-4


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_step_sees_gradients_of_at_most_the_total_norm(tiny_cfg, scale: float) -> None:
    model = Model()
    optimizer = build_optimizer(tiny_cfg, model)
    model.loss(scale).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    total = torch.cat([g.flatten() for g in before]).norm()
    factor = min(1.0, 0.1 / float(total))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-9)


def test_detectron2s_clipping_per_parameter_still_works(tiny_cfg) -> None:
    tiny_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    tiny_cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.01
    model = Model()
    optimizer = build_optimizer(tiny_cfg, model)
    model.loss(1e3).backward()
    optimizer.step()
    assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 0.01 + 1e-9
