"""Frozen batch norms as part of the convolution before them."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class ConvWithFrozenNorm(Conv2d):
    """detectron2's convolution; its norm, which is one multiplication and addition for each channel, is applied to the
    weights instead of to the map, which is many times larger. Parameters and their names are the same."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(backbone: nn.Module) -> None:
    """Let every convolution of detectron2's with a frozen norm be a :class:`ConvWithFrozenNorm`."""
    for module in backbone.modules():
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = ConvWithFrozenNorm
