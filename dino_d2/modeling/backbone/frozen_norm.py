"""Fold frozen batch norms into the preceding convolution."""

from __future__ import annotations

import logging

import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

logger = logging.getLogger(__name__)


def conv_with_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a frozen norm, one scale and shift per channel, to the weights instead of the much larger feature map."""
    weight, bias = _weight_and_bias(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _weight_and_bias(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), shift


class ConvWithFrozenNorm(Conv2d):
    """detectron2's `Conv2d` with its frozen norm folded. Parameters and their names do not change."""

    def forward(self, x: Tensor) -> Tensor:
        x = conv_with_norm(self, self.norm, x)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(backbone: nn.Module) -> None:
    """Convert every detectron2 `Conv2d` with a frozen norm to :class:`ConvWithFrozenNorm`, in place."""
    for module in backbone.modules():
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = ConvWithFrozenNorm


class ConvWithNextNorm(nn.Conv2d):
    """A convolution with the frozen norm of the module after it folded."""

    following: tuple[nn.Module]  # the norm; in a tuple, so that it keeps its one place and name

    def forward(self, x: Tensor) -> Tensor:
        return conv_with_norm(self, self.following[0], x)


class FoldedBatchNorm(_NormBase):
    """What is left of a batch norm that the convolution before applies: parameters, buffers and their names.

    Not a batch norm: `SyncBatchNorm.convert_sync_batchnorm` and its like would make it a norm that is applied again.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedBatchNormAct(FoldedBatchNorm):
    """The same for timm's, which end with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


FOLDED = {nn.BatchNorm2d: FoldedBatchNorm, BatchNormAct2d: FoldedBatchNormAct}


def fold_for_good(model: nn.Module) -> None:
    """Replace the parameters of convolutions by the folded ones, in place: for a copy that is never saved.

    Convolutions are then plain ones, with fewer operators to trace and to run.
    """
    for module in model.modules():
        if isinstance(module, ConvWithFrozenNorm):
            weight, bias = _weight_and_bias(module, module.norm)
            module.__class__, module.norm = Conv2d, None
        elif isinstance(module, ConvWithNextNorm):
            weight, bias = _weight_and_bias(module, module.following[0])
            module.__class__ = nn.Conv2d
        else:
            continue
        module.weight, module.bias = (nn.Parameter(x.detach(), requires_grad=False) for x in (weight, bias))


class _ConvsAndNorms(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def fold_following_norms(model: nn.Module) -> None:
    """Fold every batch norm whose input is the output of a convolution that nothing else uses, in place.

    They must be frozen and stay in evaluation mode. Parameters and their names do not change. A model that cannot be
    traced is left as it is.
    """
    try:
        graph = _ConvsAndNorms().trace(model)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError) as error:
        logger.info("batch norms are not folded, because the model cannot be traced: %s", error)
        return
    modules = dict(model.named_modules())
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        before = node.args[0] if type(norm) in FOLDED else None
        conv = modules.get(before.target) if before is not None and before.op == "call_module" else None
        if type(conv) is nn.Conv2d and len(before.users) == 1 and conv.padding_mode == "zeros":
            conv.__class__, conv.following = ConvWithNextNorm, (norm,)
            norm.__class__ = FOLDED[type(norm)]
