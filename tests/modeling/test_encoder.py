import pytest
import torch
from torch import Tensor

from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.modeling.encoder import DeformableEncoder, EncoderLayer
from dino_d2.modeling.layers import FeedForward

CHANNELS = 32
STRIDES = (8, 16)


def make_encoder(num_layers: int, num_levels: int = len(STRIDES)) -> DeformableEncoder:
    layers = [
        EncoderLayer(MultiScaleDeformableAttention(CHANNELS, 2, num_levels, 3), FeedForward(CHANNELS, 48, 0.0))
        for _ in range(num_layers)
    ]
    encoder = DeformableEncoder(layers, CHANNELS, num_levels, temperature=20, offset=0).double()
    for layer in encoder.layers:
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.5)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.5)
    return encoder


def make_features(height: int, width: int, batch: int = 1) -> list[Tensor]:
    sizes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    return [torch.randn(batch, CHANNELS, *size, dtype=torch.float64) for size in sizes]


def mask_of(image: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    mask = torch.ones(1, *padded, dtype=torch.bool)
    mask[:, : image[0], : image[1]] = False
    return mask


def as_maps(memory) -> list[Tensor]:
    sizes = [height * width for height, width in memory.spatial_shapes]
    return [
        tokens.transpose(1, 2).unflatten(2, shape)
        for tokens, shape in zip(memory.tokens.split(sizes, dim=1), memory.spatial_shapes, strict=True)
    ]


def test_tokens_are_the_maps_level_by_level_in_raster_order() -> None:
    features = make_features(48, 80, batch=2)
    memory = make_encoder(num_layers=0)(features, torch.zeros(2, 48, 80, dtype=torch.bool))
    assert memory.spatial_shapes == ((6, 10), (3, 5))
    assert memory.tokens.shape == (2, 75, CHANNELS)
    for ours, given in zip(as_maps(memory), features, strict=True):
        assert torch.equal(ours, given)


def test_memory_knows_padding_and_valid_ratios() -> None:
    memory = make_encoder(0)(make_features(64, 128), mask_of((32, 112), (64, 128)))
    torch.testing.assert_close(memory.valid_ratios, torch.tensor([[[0.875, 0.5]] * 2], dtype=torch.float64))
    inside = ~memory.padding_mask[0]
    assert inside[:128].view(8, 16).nonzero().max(0).values.tolist() == [3, 13]
    assert inside[128:].view(4, 8).nonzero().max(0).values.tolist() == [1, 6]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_padded_image_gives_the_tokens_of_the_image_alone(num_layers: int) -> None:
    encoder = make_encoder(num_layers)
    features = make_features(32, 64)
    alone = encoder(features, mask_of((32, 64), (32, 64)))
    padded_features = [torch.full((1, CHANNELS, 96 // s, 112 // s), 100.0, dtype=torch.float64) for s in STRIDES]
    for padded, feature in zip(padded_features, features, strict=True):
        padded[..., : feature.shape[2], : feature.shape[3]] = feature
    padded = encoder(padded_features, mask_of((32, 64), (96, 112)))
    for ours, expected in zip(as_maps(padded), as_maps(alone), strict=True):
        torch.testing.assert_close(ours[..., : expected.shape[2], : expected.shape[3]], expected)


@pytest.mark.parametrize("size", [(32, 64), (40, 72)])
def test_no_mask_says_what_an_empty_mask_says(size: tuple[int, int]) -> None:
    encoder = make_encoder(2)
    features = make_features(*size, batch=2)
    masked = encoder(features, torch.zeros(2, *size, dtype=torch.bool))
    for _ in range(2):  # the second time from what was kept
        unmasked = encoder(features, None)
        assert unmasked.padding_mask is None
        torch.testing.assert_close(unmasked.tokens, masked.tokens)
        torch.testing.assert_close(unmasked.valid_ratios, masked.valid_ratios)
        torch.testing.assert_close(unmasked.token_centres().expand(2, -1, -1), masked.token_centres())


def test_position_and_level_reach_the_attention() -> None:
    encoder = make_encoder(1)
    features, mask = make_features(32, 32), mask_of((32, 32), (32, 32))
    before = encoder(features, mask).tokens
    with torch.no_grad():
        encoder.level_embed[1] += 1
    after = encoder(features, mask).tokens
    torch.testing.assert_close(after[:, :16], before[:, :16])
    assert not torch.allclose(after[:, 16:], before[:, 16:])


def test_image_of_one_pixel_keeps_one_token_of_every_level() -> None:
    memory = make_encoder(1)(make_features(96, 112), mask_of((1, 1), (96, 112)))
    inside = ~memory.padding_mask[0]
    assert inside[: 12 * 14].sum() == inside[12 * 14 :].sum() == 1
    assert (memory.valid_ratios > 0).all()
    assert memory.tokens.isfinite().all()


def test_wrong_number_of_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_encoder(1)(make_features(32, 32)[:1], mask_of((32, 32), (32, 32)))


@pytest.mark.parametrize("width", [80, 83, 93])
def test_strides_say_where_tokens_lie_whatever_the_size_of_the_image(width: int) -> None:
    encoder = make_encoder(num_layers=0)
    encoder.strides = STRIDES
    memory = encoder(make_features(48, width), None, (48, width))
    columns = memory.spatial_shapes[0][1]
    x = memory.token_centres()[0, :columns, 0] * width
    torch.testing.assert_close(x, 8 * (torch.arange(columns).double() + 0.5))
    spread = make_encoder(num_layers=0)(make_features(48, width), None).token_centres()[0, :columns, 0] * width
    torch.testing.assert_close(spread, width / columns * (torch.arange(columns).double() + 0.5))  # as published


def test_tokens_placed_by_strides_do_not_depend_on_padding() -> None:
    encoder = make_encoder(num_layers=2)
    encoder.strides = STRIDES
    features = make_features(48, 83)
    alone = encoder(features, None, (48, 83))
    margins = ((0, 5, 0, 4), (0, 2, 0, 2))
    padded = [torch.nn.functional.pad(x, margin) for x, margin in zip(features, margins, strict=True)]
    together = encoder(padded, mask_of((48, 83), (80, 128)), (80, 128))
    torch.testing.assert_close(together.valid_sizes, alone.valid_sizes)
    inside = ~together.padding_mask[0]
    torch.testing.assert_close(together.token_centres()[:, inside], alone.token_centres())
    torch.testing.assert_close(together.tokens[:, inside], alone.tokens)
