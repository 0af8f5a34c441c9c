import pytest
import torch
from torch import nn

from dino_d2.modeling.neck import ChannelMapper

CHANNELS = (8, 16, 24)


def features() -> list[torch.Tensor]:
    return [torch.randn(2, channels, 12 // 2**i, 20 // 2**i) for i, channels in enumerate(CHANNELS)]


def test_every_level_has_the_same_channels_and_extra_levels_half_the_size() -> None:
    levels = ChannelMapper(CHANNELS, 64, 5)(features())
    assert [tuple(level.shape) for level in levels] == [
        (2, 64, 12, 20), (2, 64, 6, 10), (2, 64, 3, 5), (2, 64, 2, 3), (2, 64, 1, 2),
    ]  # fmt: skip


def test_first_extra_level_is_made_of_the_raw_last_map() -> None:
    neck, maps = ChannelMapper(CHANNELS, 64, 4), features()
    torch.testing.assert_close(neck(maps)[3], neck.extra_levels[0](maps[-1]))


def test_further_extra_levels_are_made_of_the_level_before() -> None:
    neck, maps = ChannelMapper(CHANNELS, 64, 5), features()
    levels = neck(maps)
    torch.testing.assert_close(levels[4], neck.extra_levels[1](levels[3]))


def test_backbone_maps_alone_will_do() -> None:
    assert len(ChannelMapper(CHANNELS, 64, 3)(features())) == 3


def test_levels_start_normalised() -> None:
    neck = ChannelMapper(CHANNELS, 64, 4)
    norms = [module for module in neck.modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32] * 4
    assert all(not conv.bias.any() for conv in neck.modules() if isinstance(conv, nn.Conv2d))


def test_fewer_levels_than_backbone_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"NUM_FEATURE_LEVELS is 2, but MODEL\.DINO\.IN_FEATURES names 3"):
        ChannelMapper(CHANNELS, 64, 2)


def test_channels_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.HIDDEN_DIM must be a multiple of 32, got 48"):
        ChannelMapper(CHANNELS, 48, 4)


def test_wrong_number_of_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        ChannelMapper(CHANNELS, 64, 4)(features()[:2])
