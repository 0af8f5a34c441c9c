from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from timm.layers import convert_sync_batchnorm as timm_convert
from torch import nn

from dino_d2 import add_dino_config
from dino_d2.modeling.backbone import TimmBackbone, timm_wrapper
from dino_d2.modeling.backbone.frozen_norm import (
    ConvWithFrozenNorm,
    ConvWithNextNorm,
    FoldedBatchNorm,
    fold_following_norms,
    fold_for_good,
    fold_frozen_norms,
)


def config(name: str) -> CfgNode:
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.MODEL.BACKBONE.NAME = name
    return cfg


def assert_maps_are_as_announced(backbone: nn.Module, height: int, width: int) -> None:
    """Channels and strides of `output_shape`, on an image that they need not divide."""
    maps = backbone(torch.rand(2, 3, height, width))
    assert list(maps) == list(backbone.output_shape())
    for name, shape in backbone.output_shape().items():
        expected = (2, shape.channels, -(-height // shape.stride), -(-width // shape.stride))
        assert tuple(maps[name].shape) == expected


def timm_backbone(
    name: str = "mobilenetv2_050",
    out_indices: Sequence[int] = (2, 3, 4),
    freeze_batchnorm: bool = True,
    freeze_at: int = 0,
) -> TimmBackbone:
    return TimmBackbone(name, out_indices, 3, pretrained=False, freeze_batchnorm=freeze_batchnorm, freeze_at=freeze_at)


def test_timm_model_is_built_from_config() -> None:
    cfg = config("build_timm_backbone")
    cfg.MODEL.TIMM.NAME = "mobilenetv2_050"
    cfg.MODEL.TIMM.OUT_INDICES = [1, 3]
    backbone = build_backbone(cfg)
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {"stage1": 4, "stage3": 16}
    assert_maps_are_as_announced(backbone, 64, 96)


def test_timm_maps_are_as_announced_for_odd_sizes() -> None:
    assert_maps_are_as_announced(timm_backbone(), 33, 47)


def batch_norms(backbone: nn.Module) -> list[nn.Module]:
    return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d | FoldedBatchNorm)]


def test_frozen_batchnorm_ignores_the_batch() -> None:
    backbone, images = timm_backbone().double(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for _ in range(2):
        together = backbone.train()(images)["stage4"]
        torch.testing.assert_close(together[:1], backbone(images[:1])["stage4"])
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert batch_norms(backbone)
    assert not any(p.requires_grad for norm in batch_norms(backbone) for p in norm.parameters())


def test_batchnorm_trains_if_wanted() -> None:
    backbone = timm_backbone(freeze_batchnorm=False).train()
    assert all(norm.training and norm.weight.requires_grad for norm in batch_norms(backbone))


@pytest.mark.parametrize("freeze_at", [0, 1, 2])
@pytest.mark.parametrize("name", ["mobilenetv2_050", "resnet10t"])
def test_exactly_what_makes_the_first_maps_is_frozen(name: str, freeze_at: int) -> None:
    whole = timm_backbone(name, (0, 1, 2), freeze_batchnorm=False)
    maps = list(whole(torch.rand(1, 3, 64, 64)).values())
    sum(feature.sum() for feature in maps[:freeze_at] or [torch.zeros((), requires_grad=True)]).backward()
    makers = {n for n, p in whole.named_parameters() if p.grad is not None}
    frozen = timm_backbone(name, (0, 1, 2), freeze_batchnorm=False, freeze_at=freeze_at)
    assert {n for n, p in frozen.named_parameters() if not p.requires_grad} == makers


def test_freezing_more_than_a_timm_model_has_is_an_error() -> None:
    timm_backbone(freeze_at=5)
    with pytest.raises(ValueError, match=r"FREEZE_AT is 6; for the timm model mobilenetv2_050 it must be 0 to 5"):
        timm_backbone(freeze_at=6)


@pytest.mark.parametrize("name", ["build_swin_backbone", "build_vitdet_backbone"])
def test_freezing_a_transformer_has_no_effect_and_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The recipes inherit 2 from the base config, and the published models were trained whole."""
    cfg = config(name)
    cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS = 12, [1, 1, 1, 1]
    cfg.MODEL.VITDET.EMBED_DIM, cfg.MODEL.VITDET.DEPTH, cfg.MODEL.VITDET.GLOBAL_BLOCKS = 48, 1, [0]
    for freeze_at, warned in ((0, False), (2, False), (4, True)):
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
        caplog.clear()
        assert all(parameter.requires_grad for parameter in build_backbone(cfg).parameters())
        assert (f"FREEZE_AT is {freeze_at}, but {name} freezes nothing" in caplog.text) is warned


@pytest.fixture(scope="module")
def channels_last_backbone() -> TimmBackbone:
    """Of those timm models that put channels last, one that takes images of any size: 48 channels at stride 4."""
    return timm_backbone("mambaout_femto", (0, 1)).eval()


def test_channels_of_timm_models_are_put_first(channels_last_backbone: TimmBackbone) -> None:
    assert_maps_are_as_announced(channels_last_backbone, 64, 96)


def test_channels_are_put_first_when_a_map_is_as_high_as_it_has_channels(channels_last_backbone: TimmBackbone) -> None:
    assert_maps_are_as_announced(channels_last_backbone, height=4 * 48, width=64)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_swin_is_built_from_config_and_trains(checkpoint: bool) -> None:
    cfg = config("build_swin_backbone")
    s = cfg.MODEL.SWIN
    s.EMBED_DIM, s.DEPTHS, s.NUM_HEADS, s.WINDOW_SIZE = 8, [1, 1, 2, 1], [1, 1, 2, 2], 4
    s.OUT_FEATURES, s.CHECKPOINT = ["p1", "p3"], checkpoint
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    assert {name: (shape.channels, shape.stride) for name, shape in shapes.items()} == {"p1": (16, 8), "p3": (64, 32)}
    assert_maps_are_as_announced(backbone, 50, 70)
    loss = sum(feature.square().sum() for feature in backbone(torch.rand(1, 3, 32, 32)).values())
    loss.backward()
    assert backbone.patch_embed.proj.weight.grad.any()


def test_maps_of_timm_are_normed_each_by_itself_if_wanted() -> None:
    cfg = config("build_timm_backbone")
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OUT_INDICES = "mobilenetv2_050", [2, 4]
    plain = build_backbone(cfg).eval()
    cfg.MODEL.TIMM.NORM_MAPS = True
    normed = build_backbone(cfg).eval()
    normed.body.load_state_dict(plain.body.state_dict())
    torch.nn.init.constant_(normed.norms["stage4"].bias, 3.0)
    image = torch.rand(1, 3, 64, 64)
    for name, feature in plain(image).items():
        by_token = torch.nn.functional.layer_norm(feature.movedim(1, -1), [feature.shape[1]], eps=1e-6).movedim(-1, 1)
        expected = by_token + (3.0 if name == "stage4" else 0.0)
        torch.testing.assert_close(normed(image)[name], expected)


def vitdet(**values: object) -> nn.Module:
    cfg = config("build_vitdet_backbone")
    small = {"EMBED_DIM": 32, "DEPTH": 3, "NUM_HEADS": 2, "GLOBAL_BLOCKS": [1], "WINDOW_SIZE": 2, "OUT_CHANNELS": 16}
    for key, value in (small | values).items():
        cfg.merge_from_list([f"MODEL.VITDET.{key}", value])
    return build_backbone(cfg)


def test_vitdet_is_built_from_config_and_trains() -> None:
    backbone = vitdet(IMAGE_SIZE=128).train()
    shapes = {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()}
    assert shapes == {"p3": (16, 8), "p4": (16, 16), "p5": (16, 32), "p6": (16, 64)}
    blocks = backbone.net.blocks
    assert [block.window_size for block in blocks] == [2, 0, 2]
    assert [len(block.attn.rel_pos_h) for block in blocks] == [3, 15, 3]
    assert [type(block.drop_path).__name__ for block in blocks] == ["Identity", "DropPath", "DropPath"]
    loss = sum(feature.square().sum() for feature in backbone(torch.rand(2, 3, 96, 64)).values())
    loss.backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_global_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GLOBAL_BLOCKS is \[3\]; .* 0 to 2"):
        vitdet(GLOBAL_BLOCKS=[3])


def test_vitdet_drops_what_is_no_whole_patch_and_pads_nothing() -> None:
    backbone = vitdet().eval()
    image = torch.rand(1, 3, 100, 79)
    whole, part = backbone(image), backbone(image[..., :96, :64])
    assert [tuple(feature.shape[-2:]) for feature in whole.values()] == [(12, 8), (6, 4), (3, 2), (2, 1)]
    for name, feature in whole.items():
        torch.testing.assert_close(feature, part[name])


# --- frozen norms


def frozen_resnet() -> tuple[nn.Module, nn.Module]:
    """As detectron2 builds it, with norms that do something; and the same with norms folded."""
    cfg = config("build_resnet_backbone")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.BACKBONE.FREEZE_AT = 18, 64, 2
    plain = build_backbone(cfg).double()
    for module in plain.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in (module.weight, module.running_var):
                buffer.uniform_(0.5, 1.5)
            for buffer in (module.bias, module.running_mean):
                buffer.normal_(0, 0.5)
    folded = deepcopy(plain)
    fold_frozen_norms(folded)
    return plain, folded


def test_folded_norms_give_the_same_maps_and_gradients() -> None:
    plain, folded = frozen_resnet()
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    maps = [backbone(image)["res4"] for backbone in (plain, folded)]
    torch.testing.assert_close(maps[1], maps[0])
    weights = torch.randn_like(maps[0])
    for map_ in maps:
        (map_ * weights).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), folded.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad)


def test_folding_leaves_the_names_and_no_norm_is_run_by_itself() -> None:
    plain, folded = frozen_resnet()
    assert folded.state_dict().keys() == plain.state_dict().keys()
    runs = []
    for module in folded.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.register_forward_hook(lambda *_: runs.append(1))
    folded(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert not runs


def test_norms_folded_for_good_give_the_same_maps_with_plain_convolutions() -> None:
    _, folded = frozen_resnet()
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = folded(image)["res4"]
    fold_for_good(folded)
    torch.testing.assert_close(folded(image)["res4"], expected)
    assert not [m for m in folded.modules() if isinstance(m, ConvWithFrozenNorm | FrozenBatchNorm2d)]


def test_trained_norms_are_not_folded() -> None:
    cfg = config("build_resnet_backbone")
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.BACKBONE.FREEZE_AT = 18, 64, 0
    backbone = build_backbone(cfg)
    fold_frozen_norms(backbone)
    assert not any(isinstance(module, ConvWithFrozenNorm) for module in backbone.modules())


def test_swin_recomputed_block_by_block_has_the_same_gradients_and_no_warning() -> None:
    cfg = config("build_swin_backbone")
    cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.DROP_PATH_RATE = 12, [2, 2, 1, 1], 0.2
    results, kept = [], []
    for recompute in (False, True):
        cfg.MODEL.SWIN.CHECKPOINT = recompute
        torch.manual_seed(0)
        backbone = deepcopy(build_backbone(cfg)).train()  # as the moving average copies it
        sizes: list[int] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*reentrant.*")
            warnings.filterwarnings("error", message=".*requires_grad.*")
            torch.manual_seed(1)
            with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x):
                loss = sum(level.sum() for level in backbone(torch.rand(1, 3, 64, 64)).values())
            loss.backward()
        kept.append(sum(sizes))
        results.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert kept[1] < 0.5 * kept[0]
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


# --- batch norms of timm's models


def frozen_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[TimmBackbone, TimmBackbone]:
    """A timm model in float64 with norms that do something; and the same with norms folded."""
    with monkeypatch.context() as patch:
        patch.setattr(timm_wrapper, "fold_following_norms", lambda model: None)
        plain = TimmBackbone(name, [2, 3, 4], 3, pretrained=False, freeze_batchnorm=True, freeze_at=1).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    folded = deepcopy(plain)
    fold_following_norms(folded.body)
    return plain, folded


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("mobilenetv2_100", 51), ("resnet18", 20), ("densenet121", 59), ("tf_efficientnet_lite0", 43)],
)
def test_norms_of_timm_are_folded_where_nothing_else_uses_the_convolution(
    name: str, convolutions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those after a concatenation or after a convolution that pads by itself."""
    plain, folded = frozen_timm(name, monkeypatch)
    folded = deepcopy(folded)  # as the moving average copies it
    assert sum(isinstance(module, ConvWithNextNorm) for module in folded.modules()) == convolutions
    assert list(folded.state_dict()) == list(plain.state_dict())
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    maps = [backbone.train()(image) for backbone in (plain, folded)]
    for level in plain.output_shape():
        torch.testing.assert_close(maps[1][level], maps[0][level])
        for map_ in maps:
            (map_[level] ** 2).mean().backward(retain_graph=True)
    for (parameter, a), b in zip(plain.named_parameters(), folded.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), parameter
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad)
    fold_for_good(folded)
    assert not [module for module in folded.modules() if isinstance(module, ConvWithNextNorm)]
    for level, map_ in folded(image).items():
        torch.testing.assert_close(map_, maps[0][level])


@pytest.mark.parametrize(
    "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, FrozenBatchNorm2d.convert_frozen_batchnorm, timm_convert]
)
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])  # whose norms are all folded
def test_converters_of_batch_norms_leave_the_folded_ones(
    name: str, convert: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folded = frozen_timm(name, monkeypatch)
    folded.eval()
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, norms = folded(image), [m for m in folded.modules() if isinstance(m, FoldedBatchNorm)]
    converted = convert(folded).eval()
    assert norms
    assert [m for m in converted.modules() if isinstance(m, FoldedBatchNorm)] == norms
    for level, map_ in converted(image).items():
        torch.testing.assert_close(map_, expected[level])


def test_folded_norms_load_files_without_counts_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch before 0.4.1, as batch norms do."""
    plain, folded = frozen_timm("resnet18", monkeypatch)
    state = {name: x for name, x in plain.state_dict().items() if not name.endswith("num_batches_tracked")}
    folded.load_state_dict(OrderedDict(state))


def test_trained_norms_of_timm_are_not_folded() -> None:
    backbone = TimmBackbone("mobilenetv2_100", [3, 4], 3, pretrained=False, freeze_batchnorm=False, freeze_at=0)
    assert not any(isinstance(module, ConvWithNextNorm) for module in backbone.modules())
