"""What an untrained model starts from, and that settings arrive."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from dino_d2 import ops
from dino_d2.modeling import build
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention


def assert_xavier(name: str, weight: Tensor) -> None:
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.95 * bound < weight.abs().max() <= bound, name


def test_matrices_of_the_transformer_start_with_xavier(tiny_cfg) -> None:
    encoder, decoder = build.build_encoder(tiny_cfg), build.build_decoder(tiny_cfg)
    own = ("sampling_offsets", "attention_weights")  # deformable attention knows better
    matrices = [
        (name, parameter)
        for part in (encoder.layers, decoder.layers, decoder.query_position)
        for name, parameter in part.named_parameters()
        if parameter.dim() > 1 and not any(word in name for word in own)
    ]
    assert len(matrices) == 4 + 2 * (2 + 4) + 2
    for name, weight in matrices:
        assert_xavier(name, weight)


def test_deformable_attention_starts_as_its_ring(tiny_cfg) -> None:
    for part in (build.build_encoder(tiny_cfg), build.build_decoder(tiny_cfg)):
        attentions = [module for module in part.modules() if isinstance(module, MultiScaleDeformableAttention)]
        assert attentions
        for attention in attentions:
            assert not attention.sampling_offsets.weight.any()
            assert not attention.attention_weights.weight.any()
            largest = attention.sampling_offsets.bias.view(4, 4, 4, 2).abs().amax(-1)  # heads, levels, points
            torch.testing.assert_close(largest, torch.arange(1.0, 5.0).expand_as(largest))


def test_query_selection_starts_with_xavier(tiny_cfg) -> None:
    selection = build.build_query_selection(tiny_cfg)
    assert_xavier("content", selection.content.weight)
    assert_xavier("project", selection.proposals.project.weight)


def test_embeddings_of_levels_and_labels_start_normal(tiny_cfg) -> None:
    for weight in (build.build_encoder(tiny_cfg).level_embed, build.build_denoising(tiny_cfg).label_embed.weight):
        assert weight.std().item() == pytest.approx(1, abs=0.15)


def test_heads_start_with_the_prior_and_without_moving_boxes(tiny_cfg) -> None:
    decoder, selection = build.build_decoder(tiny_cfg), build.build_query_selection(tiny_cfg)
    for head in (decoder.class_heads[0], selection.proposals.class_head):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((5,), 0.01))
    for head in (decoder.box_heads[0], selection.proposals.box_head):
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()


def test_encoder_and_decoder_have_heads_of_their_own(tiny_cfg) -> None:
    decoder, selection = build.build_decoder(tiny_cfg), build.build_query_selection(tiny_cfg)
    assert not {id(p) for p in decoder.parameters()} & {id(p) for p in selection.parameters()}


def test_dropout_reaches_every_block(tiny_config) -> None:
    cfg = tiny_config(DROPOUT=0.25)
    for part in (build.build_encoder(cfg), build.build_decoder(cfg)):
        rates = [m.p for m in part.modules() if isinstance(m, nn.Dropout)]
        rates += [m.dropout for m in part.modules() if isinstance(m, nn.MultiheadAttention)]
        assert rates
        assert set(rates) == {0.25}


def test_settings_of_denoising_losses_and_matching_arrive(tiny_config) -> None:
    cfg = tiny_config(
        DN__NUMBER=7, DN__LABEL_NOISE_RATIO=0.3, DN__BOX_NOISE_SCALE=0.4, DN__MAX_QUERIES=50, LOSS__CLASS_WEIGHT=1.5,
        LOSS__L1_WEIGHT=2.5, LOSS__GIOU_WEIGHT=3.5, MATCHER__CLASS_WEIGHT=4.5, MATCHER__L1_WEIGHT=5.5,
        MATCHER__GIOU_WEIGHT=6.5,
    )  # fmt: skip
    denoising, criterion = build.build_denoising(cfg), build.build_criterion(cfg)
    assert (denoising.num_classes, denoising.number, denoising.max_queries) == (5, 7, 50)
    assert (denoising.label_noise_ratio, denoising.box_noise_scale) == (0.3, 0.4)
    assert denoising.label_embed.weight.shape == (6, 64)  # a row more than classes, as in released weights
    weights, matcher = criterion.weights, criterion.matcher
    assert (weights.classification, weights.l1, weights.giou) == (1.5, 2.5, 3.5)
    assert (matcher.class_weight, matcher.l1_weight, matcher.giou_weight) == (4.5, 5.5, 6.5)


def test_settings_of_the_transformer_arrive(tiny_config) -> None:
    cfg = tiny_config(ENC_LAYERS=2, DEC_LAYERS=3, NUM_POINTS=2, NHEADS=2, POS_TEMPERATURE=7.0, POS_OFFSET=-0.5)
    encoder, decoder = build.build_encoder(cfg), build.build_decoder(cfg)
    assert (len(encoder.layers), len(decoder.layers)) == (2, 3)
    assert (encoder.temperature, encoder.offset) == (7.0, -0.5)
    for layer in (*encoder.layers, *decoder.layers):
        attention = layer.self_attn if layer in list(encoder.layers) else layer.cross_attn
        assert (attention.num_heads, attention.num_levels, attention.num_points) == (2, 4, 2)
        assert layer.ffn.linear1.out_features == 64
    assert decoder.layers[0].self_attn.num_heads == 2


@pytest.mark.parametrize(
    ("choice", "op"),
    [
        ("auto", ops.ms_deform_attn_fused),
        ("compiled", ops.ms_deform_attn_fused),
        ("reference", ops.ms_deform_attn_fused_reference),
    ],
)
def test_op_is_the_one_chosen(tiny_cfg, choice: str, op: Callable) -> None:
    tiny_cfg.MODEL.DINO.OP = choice
    for part in (build.build_encoder(tiny_cfg), build.build_decoder(tiny_cfg)):
        attentions = [module for module in part.modules() if isinstance(module, MultiScaleDeformableAttention)]
        assert attentions
        assert all(attention.op is op for attention in attentions)


def test_compiled_op_does_not_fall_back(tiny_cfg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.library, "_available", {})
    monkeypatch.setattr(ops.library, "_DISPATCH_KEYS", {})
    build.build_encoder(tiny_cfg)  # auto does
    tiny_cfg.MODEL.DINO.OP = "compiled"
    with pytest.raises(ImportError, match=r"built without kernels for cpu.*make setup"):
        build.build_encoder(tiny_cfg)


def test_unknown_op_is_refused(tiny_cfg) -> None:
    tiny_cfg.MODEL.DINO.OP = "fastest"
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.OP is 'fastest'; it must be one of auto, compiled, reference"):
        build.build_encoder(tiny_cfg)


@pytest.mark.parametrize("key", ["NUM_QUERIES", "NHEADS", "DEC_LAYERS", "INTERLEAVED.COARSE_UPDATES"])
def test_none_of_what_every_detector_has_is_refused(tiny_cfg, key: str) -> None:
    tiny_cfg.merge_from_list([f"MODEL.DINO.{key}", 0])
    with pytest.raises(ValueError, match=rf"MODEL\.DINO\.{key} is 0; it must be at least 1"):
        build_model(tiny_cfg)


def test_a_negative_width_is_refused(tiny_cfg) -> None:
    """0 has a meaning."""
    tiny_cfg.merge_from_list(["MODEL.DINO.INTERLEAVED.FINEST_FEEDFORWARD", -1])
    with pytest.raises(ValueError, match=r"INTERLEAVED\.FINEST_FEEDFORWARD is -1; it must be at least 0"):
        build_model(tiny_cfg)
