"""Converted backbones put out the same maps as those the weights were made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_model

from dino_d2 import load_config
from dino_d2.checkpoint import DINOCheckpointer, from_backbone
from dino_d2.checkpoint.backbone import is_backbone
from dino_d2.checkpoint.convert import ConversionError
from dino_d2.meta_arch import DINO
from tests.checkpoint.test_convert import resnet_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SWIN = str(CONFIGS / "dino_swint_4scale_12ep.yaml")
VIT = str(CONFIGS / "dino_vitdetb_4scale_12ep.yaml")
SMALL = ["MODEL.DINO.ENC_LAYERS", "1", "MODEL.DINO.DEC_LAYERS", "1", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]


def test_torchvisions_resnet() -> None:
    theirs = torchvision.models.resnet18().eval()
    for name, tensor in theirs.state_dict().items():
        if "running" in name:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    state = theirs.state_dict()
    assert is_backbone(state)
    model = build_model(resnet_config()).eval()
    conversion = from_backbone(state, model)
    assert any("fc.weight" in note for note in conversion.notes)
    model.load_state_dict(conversion.state, strict=False)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image)))))
        expected = theirs.layer2(expected)
        torch.testing.assert_close(model.backbone(image)["res3"], expected, rtol=1e-4, atol=1e-4)


def test_backbone_is_good_for_any_number_of_classes(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    conversion = from_backbone(state, build_model(resnet_config("MODEL.DINO.NUM_CLASSES", "91")))
    torch.save({"model": conversion.state}, tmp_path / "backbone.pth")
    for number in ("2", "91"):
        DINOCheckpointer(build_model(resnet_config("MODEL.DINO.NUM_CLASSES", number))).load(
            str(tmp_path / "backbone.pth")
        )


@pytest.mark.parametrize("shifted", [True, False], ids=["timm", "Swin release"])
def test_swin(shifted: bool) -> None:
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10).eval()
    state = dict(theirs.state_dict())
    if not shifted:
        for stage in range(3):
            for rest in ("norm.weight", "norm.bias", "reduction.weight"):
                state[f"layers.{stage}.downsample.{rest}"] = state.pop(f"layers.{stage + 1}.downsample.{rest}")
    model = build_model(load_config(SWIN, SMALL)).eval()
    conversion = from_backbone(state, model)
    model.load_state_dict(conversion.state, strict=False)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = model.backbone(image)["p2"]
        tokens = theirs.layers[2](theirs.layers[1](theirs.layers[0](theirs.patch_embed(image))))
        expected = F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


VITDET = [
    "MODEL.VITDET.EMBED_DIM", "32", "MODEL.VITDET.DEPTH", "2", "MODEL.VITDET.NUM_HEADS", "2",
    "MODEL.VITDET.GLOBAL_BLOCKS", "[0, 1]",
]  # fmt: skip


@pytest.mark.parametrize("way", ["converted", "converted file", "by the ends of the names"])
def test_vit_of_mae(way: str, tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    state = theirs.state_dict()  # of timm's names, which MAE has
    assert is_backbone(state)
    model = build_model(load_config(VIT, [*SMALL, *VITDET])).eval()
    conversion = from_backbone(state, model)
    assert "cls_token: not needed for feature maps, ignored" in conversion.notes
    torch.save({"model": conversion.state}, tmp_path / "converted.pth")
    torch.save({"model": state}, tmp_path / "mae.pth")
    if way == "converted":
        model.load_state_dict(conversion.state, strict=False)
    elif way == "converted file":
        DINOCheckpointer(model).load(str(tmp_path / "converted.pth"))
    else:
        DINOCheckpointer(model).load(f"{tmp_path / 'mae.pth'}?matching_heuristics=True")
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = model.backbone.net(image)["vit"]
        tokens = theirs.patch_embed(image) + theirs.pos_embed[:, 1:]
        expected = theirs.blocks(tokens).transpose(1, 2).reshape(1, 32, 14, 14)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_backbone_is_a_start_for_any_classes_and_encoder() -> None:
    def named(*names: str, encoder: str = "deformable") -> DINO:
        values = ["MODEL.DINO.NUM_CLASSES", "2", "MODEL.DINO.CLASS_NAMES", str(list(names)), "MODEL.DINO.ENCODER"]
        return build_model(resnet_config(*values, encoder))

    conversion = from_backbone(torchvision.models.resnet18().state_dict(), named("cat", "dog"))
    for encoder in ("deformable", "interleaved"):
        named("sun", "moon", encoder=encoder).load_state_dict(conversion.state, strict=False)


def test_what_does_not_fit_is_listed() -> None:
    state = torchvision.models.resnet34().state_dict()
    with pytest.raises(ConversionError, match=r"unexpected: layer1\.2\.conv1\.weight"):
        from_backbone(state, build_model(resnet_config()))
