"""Blocks that update the coarse levels several times and the finest level once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from dino_d2 import load_config
from dino_d2.analysis import analyze
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.modeling.encoder import DeformableEncoder, EncoderLayer
from dino_d2.modeling.interleaved_encoder import InterleavedBlock
from dino_d2.modeling.layers import FeedForward
from dino_d2.structures import Memory
from tests.modeling.test_encoder import as_maps, mask_of

CONFIGS = Path(__file__).parents[2] / "configs"
CHANNELS = 32
STRIDES = (8, 16, 32)


def make_layer(num_levels: int, hidden: int) -> EncoderLayer:
    layer = EncoderLayer(
        MultiScaleDeformableAttention(CHANNELS, 2, num_levels, 3), FeedForward(CHANNELS, hidden, 0.0)
    ).double()
    torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.5)
    torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.5)
    return layer


def make_block(num_levels: int = len(STRIDES), coarse_updates: int = 2) -> InterleavedBlock:
    return InterleavedBlock([make_layer(num_levels, 48) for _ in range(coarse_updates)], make_layer(num_levels, 16))


def make_encoder(num_blocks: int, num_levels: int = len(STRIDES)) -> DeformableEncoder:
    blocks = [make_block(num_levels) for _ in range(num_blocks)]
    return DeformableEncoder(blocks, CHANNELS, num_levels, temperature=20, offset=0).double()


def make_features(height: int, width: int, num_levels: int = len(STRIDES), batch: int = 1) -> list[Tensor]:
    sizes = [(height // 8 // 2**level, width // 8 // 2**level) for level in range(num_levels)]
    return [torch.randn(batch, CHANNELS, *size, dtype=torch.float64) for size in sizes]


def inputs_of_a_block(memory: Memory) -> tuple[Memory, Tensor, Tensor]:
    reference = memory.token_centres()[:, :, None] * memory.valid_ratios[:, None]
    return memory, torch.randn_like(memory.tokens), reference


def test_block_is_its_updates_by_hand(make_memory: Callable[..., Memory]) -> None:
    """A layer run on all tokens, of which only the part that is updated is taken."""
    memory, position, reference = inputs_of_a_block(make_memory(((8, 6), (4, 3), (2, 2))))
    block = make_block()
    tokens = memory.tokens
    for layer in block.coarse:
        everything = layer(replace(memory, tokens=tokens), position, reference).tokens
        tokens = torch.cat([tokens[:, :48], everything[:, 48:]], dim=1)
    everything = block.finest(replace(memory, tokens=tokens), position, reference).tokens
    expected = torch.cat([everything[:, :48], tokens[:, 48:]], dim=1)
    torch.testing.assert_close(block(memory, position, reference).tokens, expected)


def test_coarse_updates_leave_the_finest_tokens_as_they_are(make_memory: Callable[..., Memory]) -> None:
    inputs = inputs_of_a_block(make_memory(((8, 6), (4, 3), (2, 2))))
    block = make_block()
    seen = []
    block.finest.update = lambda tokens, position, reference, memory: seen.append(memory.tokens) or tokens
    result = block(*inputs)
    (before_the_finest,) = seen
    assert torch.equal(before_the_finest[:, :48], inputs[0].tokens[:, :48])
    assert not torch.isclose(before_the_finest[:, 48:], inputs[0].tokens[:, 48:]).all(-1).any()
    assert torch.equal(result.tokens, before_the_finest)


@pytest.mark.parametrize("num_levels", [2, 3, 5])
def test_any_number_of_levels_gives_tokens_of_its_maps(num_levels: int) -> None:
    features = make_features(128, 256, num_levels, batch=2)
    memory = make_encoder(2, num_levels)(features, torch.zeros(2, 128, 256, dtype=torch.bool))
    assert memory.spatial_shapes == tuple(tuple(feature.shape[-2:]) for feature in features)
    assert memory.tokens.isfinite().all()
    for ours, given in zip(as_maps(memory), features, strict=True):
        assert ours.shape == given.shape
        assert not torch.isclose(ours, given).all(1).any()  # every token was updated


def test_padded_image_gives_the_tokens_of_the_image_alone() -> None:
    encoder = make_encoder(2)
    features = make_features(32, 64)
    alone = encoder(features, mask_of((32, 64), (32, 64)))
    padded_features = [torch.full((1, CHANNELS, 96 // s, 128 // s), 100.0, dtype=torch.float64) for s in STRIDES]
    for padded, feature in zip(padded_features, features, strict=True):
        padded[..., : feature.shape[2], : feature.shape[3]] = feature
    padded = encoder(padded_features, mask_of((32, 64), (96, 128)))
    for ours, expected in zip(as_maps(padded), as_maps(alone), strict=True):
        torch.testing.assert_close(ours[..., : expected.shape[2], : expected.shape[3]], expected)


def test_gradients_reach_every_parameter_and_every_map() -> None:
    encoder = make_encoder(2)
    features = [feature.requires_grad_() for feature in make_features(64, 64)]
    memory = encoder(features, mask_of((48, 64), (64, 64)))
    (memory.tokens * torch.randn_like(memory.tokens)).sum().backward()
    assert all(
        x.grad is not None and x.grad.any() and x.grad.isfinite().all() for x in (*features, *encoder.parameters())
    )


def test_recomputing_changes_no_gradient() -> None:
    encoder = make_encoder(2)
    features, mask = make_features(64, 64), mask_of((48, 64), (64, 64))
    gradients = []
    for recompute in (False, True):
        encoder.recompute = recompute
        gradients.append(torch.autograd.grad(encoder(features, mask).tokens.square().sum(), list(encoder.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


# --- from a config


def test_settings_arrive(tiny_config: Callable) -> None:
    cfg = tiny_config(
        ENCODER="interleaved", ENC_LAYERS=2, INTERLEAVED__COARSE_UPDATES=3, INTERLEAVED__FINEST_FEEDFORWARD=24
    )
    blocks = build_model(cfg).encoder.layers
    assert [len(block.coarse) for block in blocks] == [3, 3]
    assert {layer.ffn.linear1.out_features for block in blocks for layer in block.coarse} == {64}
    assert {block.finest.ffn.linear1.out_features for block in blocks} == {24}


def test_the_finest_level_can_stay_as_it_is(tiny_config: Callable, make_memory: Callable[..., Memory]) -> None:
    (block,) = build_model(
        tiny_config(ENCODER="interleaved", ENC_LAYERS=1, INTERLEAVED__FINEST_FEEDFORWARD=0)
    ).encoder.layers
    assert block.finest is None
    memory, position, reference = inputs_of_a_block(make_memory(((8, 6), (4, 3), (2, 2))))
    block, alone = make_block(), make_block()
    alone.coarse, alone.finest = block.coarse, None
    whole, coarse = (as_maps(x(memory, position, reference)) for x in (block, alone))
    assert torch.equal(coarse[0], as_maps(memory)[0])
    assert not torch.equal(whole[0], coarse[0])
    for ours, expected in zip(coarse[1:], whole[1:], strict=True):
        assert torch.equal(ours, expected)


def test_one_level_is_refused(tiny_config: Callable) -> None:
    cfg = tiny_config(ENCODER="interleaved", IN_FEATURES=["stage4"], NUM_FEATURE_LEVELS=1)
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.NUM_FEATURE_LEVELS is 1; use deformable"):
        build_model(cfg)


def test_unknown_encoder_is_refused(tiny_config: Callable) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.ENCODER is 'lite'; it must be one of deformable, interleaved"):
        build_model(tiny_config(ENCODER="lite"))


def test_recipe_costs_under_half_of_the_deformable_encoder() -> None:
    """The share hardly depends on the image's size; a small one is counted quickly."""
    names = ("small/dino_r50_4scale_interleaved_12ep", "dino_r50_4scale_12ep")
    models = [build_model(load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])) for name in names]
    interleaved, deformable = (analyze(model, 192, 320) for model in models)
    assert interleaved.stages["encoder"].flops < 0.5 * deformable.stages["encoder"].flops
    for stage in ("backbone", "neck", "decoder"):
        assert interleaved.stages[stage] == deformable.stages[stage]
    assert not any("linear" in name or "mm" in name for name in interleaved.not_counted)
