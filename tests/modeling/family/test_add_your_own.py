"""The last section of docs/family.md, step by step."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.nn.functional import binary_cross_entropy_with_logits

from dino_d2 import load_config
from dino_d2.engine import build_optimizer
from dino_d2.modeling.build import CLASS_LOSSES
from tests.synthetic import make_batch

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "family.md").read_text()


def toy_loss(predictions, pairs, labels, iou):
    """Binary cross-entropy with the IoU of the pair as target."""
    target = torch.zeros_like(predictions.logits)
    target[pairs.class_logits(labels)] = pairs.weighted(iou).to(target.dtype)
    loss = binary_cross_entropy_with_logits(predictions.logits, target, reduction="sum")
    return loss, pairs.weight


RECIPE = """
_BASE_: ../Base-DINO-tuned.yaml
MODEL:
  DINO:
    LOSS:
      CLASS: toy
OUTPUT_DIR: output/family/toy
"""


@pytest.fixture
def toy_cfg(tmp_path: Path, tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """The recipe's loss on the tiny model."""
    monkeypatch.setitem(CLASS_LOSSES, "toy", toy_loss)
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(RECIPE.replace("../", f"{ROOT / 'configs'}/"))
    tiny_cfg.MODEL.DINO.LOSS = load_config(str(recipe)).MODEL.DINO.LOSS
    return tiny_cfg


def test_documentation_shows_this_code() -> None:
    own = PAGE[PAGE.index("## Add your own") :]
    assert textwrap.dedent(inspect.getsource(toy_loss)) in own
    assert RECIPE in own
    assert len(own.splitlines()) < 60  # one screen


def test_toy_loss_is_found_by_its_name_and_learns(toy_cfg: CfgNode) -> None:
    toy_cfg.SOLVER.BASE_LR = 1e-3
    model = build_model(toy_cfg).train()
    assert model.criterion.class_loss is toy_loss
    optimizer, batch, totals = build_optimizer(toy_cfg, model), make_batch([2, 1]), []
    for _ in range(25):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        totals.append(sum(losses.values()).item())
    assert totals[-1] < 0.6 * totals[0]


def test_toy_loss_goes_with_copies(toy_cfg: CfgNode) -> None:
    toy_cfg.MODEL.DINO.MATCHER.COPIES = 2
    losses = build_model(toy_cfg).train()(make_batch([3, 0, 30]))
    assert all(loss.isfinite() for loss in losses.values())


def test_without_its_line_the_name_is_refused(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.DINO.LOSS.CLASS = "toy"
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.LOSS\.CLASS is 'toy'; it must be one of focal, iou_aware"):
        build_model(tiny_cfg)
