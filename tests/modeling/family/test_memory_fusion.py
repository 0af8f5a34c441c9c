from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn

from dino_d2 import load_config
from dino_d2.checkpoint import DINOCheckpointer, from_backbone, from_published, to_published
from dino_d2.checkpoint.convert import ConversionError
from tests.checkpoint.test_convert import published_by, resnet_config
from tests.synthetic import make_batch

FUSION = ("MODEL.DINO.MEMORY_FUSION", "True")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_recipe_adds_so_many_parameters() -> None:
    cfg = load_config("dino_r50_4scale_12ep", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    plain = count(build_model(cfg))
    cfg.MODEL.DINO.MEMORY_FUSION = True
    assert count(build_model(cfg)) - plain == 7 * 256 * 256 + 3 * 256  # 0.46 million


@pytest.mark.parametrize("encoder", ["deformable", "interleaved"])
def test_every_layer_is_heard_and_trained(encoder: str, tiny_config: Callable) -> None:
    model = build_model(tiny_config(MEMORY_FUSION=True, ENCODER=encoder, ENC_LAYERS=2)).train()
    sum(model(make_batch([2, 1])).values()).backward()
    blocks = model.encoder.fusion[0].weight.grad.split(64, dim=1)
    assert len(blocks) == 3
    assert all(block.any() and block.isfinite().all() for block in blocks)


def test_recomputing_changes_no_gradient(tiny_config: Callable) -> None:
    model = build_model(tiny_config(MEMORY_FUSION=True, DN__TYPE="none")).train()
    batch, gradients = make_batch([2]), []
    for recompute in (False, True):
        model.encoder.recompute = recompute
        losses = sum(model(batch).values())
        gradients.append(torch.autograd.grad(losses, list(model.encoder.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_weights_with_and_without_it_are_told_apart(tmp_path: Path) -> None:
    plain, fusing = build_model(resnet_config()), build_model(resnet_config(*FUSION))
    for name, model, other, message in (
        ("plain", plain, fusing, "MEMORY_FUSION is True, the weights are for False"),
        ("fusing", fusing, plain, "MEMORY_FUSION is False, the weights are for True"),
    ):
        DetectionCheckpointer(model, str(tmp_path)).save(name)
        for checkpointer in (DINOCheckpointer, DetectionCheckpointer):
            with pytest.raises(ValueError, match=message):
                checkpointer(other).load(str(tmp_path / f"{name}.pth"))


def test_published_programs_have_no_such_weights() -> None:
    model = build_model(resnet_config(*FUSION))
    with pytest.raises(ConversionError, match="MEMORY_FUSION is True, the weights are for False"):
        from_published(published_by("official"), "official", model)
    with pytest.raises(ConversionError, match="MEMORY_FUSION is True, which official does not have"):
        to_published(model.state_dict(), "official", model)


def test_backbone_is_a_start_for_it(tmp_path: Path) -> None:
    plain, fusing = build_model(resnet_config()), build_model(resnet_config(*FUSION))
    state = from_backbone(torchvision.models.resnet18().state_dict(), plain).state
    torch.save({"model": state}, tmp_path / "backbone.pth")
    DINOCheckpointer(fusing).load(str(tmp_path / "backbone.pth"))
    assert torch.equal(fusing.backbone.stem.conv1.weight, state["backbone.stem.conv1.weight"])
