"""Linear layers that multiply 8-bit integers (`TEST.QUANTIZE`): dynamic quantization, for prediction on a CPU.

Weights are rounded to 8 bits, with a scale for each output channel. Inputs are rounded to 7 bits, with a scale for each
call: of 8 bits, the sum of two products can exceed the 16 bits in which processors without VNNI add them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_INPUT, LARGEST_WEIGHT = 127, 127


@dataclass(frozen=True)
class PackedWeights:
    """Rounded weights in oneDNN's own layout. `version`: of the weights that they were made from."""

    version: tuple[int, int]
    weights: Tensor
    scales: Tensor
    zeros: Tensor


class QuantizableLinear(nn.Linear):
    """`nn.Linear` which :func:`multiply_in_int8` can switch over. Training and checkpoints do not change.

    Rounded weights are kept in evaluation mode, until `train` or `eval` is called, weights are loaded, or gradients are
    recorded: PyTorch tells of a change in place, but not of one by a fused optimizer or through `.data`.
    """

    int8 = False
    _packed: PackedWeights | None = None

    def train(self, mode: bool = True) -> QuantizableLinear:
        self._packed = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None and torch.is_grad_enabled():
            self._packed = None  # an optimizer may follow
        if not self.int8 or torch.is_grad_enabled() or x.dtype != torch.float32 or x.numel() == 0:
            return super().forward(x)
        low, high = (bound.item() for bound in x.aminmax())
        low, high = min(low, 0.0), max(high, 0.0)
        if not math.isfinite(high - low):
            return super().forward(x)
        scale = (high - low) / LARGEST_INPUT or 1.0
        zero = round(-low / scale)
        # Towards 0, and nothing is below it. Both types have these 7 bits; PyTorch converts to int8 six times as fast.
        rounded = torch.add(zero + 0.5, x, alpha=1 / scale).to(torch.int8).view(torch.uint8)
        packed = self._pack()
        result = torch.ops.onednn.qlinear_pointwise(
            rounded.flatten(0, -2), scale, zero, packed.weights, packed.scales, packed.zeros, self.bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result.view(*x.shape[:-1], self.out_features)

    def _pack(self) -> PackedWeights:
        # Tensors made in inference mode count no versions.
        version = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self.training or self._packed is None or self._packed.version != version:
            scales = (self.weight.abs().amax(1) / LARGEST_WEIGHT).clamp(min=torch.finfo(torch.float32).tiny)
            rounded = (self.weight / scales[:, None]).round().to(torch.int8)
            weights = torch.ops.onednn.qlinear_prepack(rounded, None)
            self._packed = PackedWeights(version, weights, scales, torch.zeros_like(scales, dtype=torch.int32))
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # oneDNN's layout can be neither copied nor saved


def multiply_in_int8(module: nn.Module) -> None:
    """Let all `QuantizableLinear` layers of a module on a CPU multiply in int8 where no gradients are recorded."""
    for layer in module.modules():
        if isinstance(layer, QuantizableLinear):
            layer.int8 = True
