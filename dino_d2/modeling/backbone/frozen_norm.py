"""Fold frozen batch norms into the preceding convolution."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class ConvWithFrozenNorm(Conv2d):
    """detectron2's `Conv2d` that applies its frozen norm, one scale and shift per channel, to the weights instead of
    the much larger feature map. Parameters and their names do not change."""

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
    """Convert every detectron2 `Conv2d` with a frozen norm to :class:`ConvWithFrozenNorm`, in place."""
    for module in backbone.modules():
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = ConvWithFrozenNorm
