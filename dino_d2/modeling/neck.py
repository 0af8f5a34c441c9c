"""Project the backbone's feature maps to L maps with the same number of channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

NORM_GROUPS = 32


class ChannelMapper(nn.Module):
    """A 1x1 convolution per backbone level, and stride-2 3x3 convolutions for coarser levels.

    The first extra level is computed from the last backbone map, each further one from the level before; every
    convolution is followed by GroupNorm(32).

    Args:
        in_channels: channels of each backbone map, finest first.
        out_channels: a multiple of 32.
        num_levels: L, at least the number of backbone maps.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_levels: int):
        super().__init__()
        if num_levels < len(in_channels):
            raise ValueError(
                f"MODEL.DINO.NUM_FEATURE_LEVELS is {num_levels}, but MODEL.DINO.IN_FEATURES names "
                f"{len(in_channels)} maps"
            )
        if out_channels % NORM_GROUPS:
            raise ValueError(f"MODEL.DINO.HIDDEN_DIM must be a multiple of {NORM_GROUPS}, got {out_channels}")
        self.projections = nn.ModuleList(_projection(channels, out_channels, 1, 1) for channels in in_channels)
        extra_inputs = [in_channels[-1], *[out_channels] * num_levels][: num_levels - len(in_channels)]
        self.extra_levels = nn.ModuleList(_projection(channels, out_channels, 3, 2) for channels in extra_inputs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, in_channels, h, w), finest first -> L maps (B, out_channels, h, w), finest first."""
        levels = [project(feature) for project, feature in zip(self.projections, features, strict=True)]
        coarsest = features[-1]
        for downsample in self.extra_levels:
            coarsest = downsample(coarsest)
            levels.append(coarsest)
        return levels


def _projection(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, out_channels))
