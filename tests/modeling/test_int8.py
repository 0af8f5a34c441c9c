from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from dino_d2.engine.optimizer import ClippedAdamW
from dino_d2.modeling.build import int8_of_config
from dino_d2.modeling.int8 import QuantizableLinear, multiply_in_int8

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")


@pytest.fixture
def layer() -> QuantizableLinear:
    return QuantizableLinear(64, 48)


def in_int8(layer: QuantizableLinear, x: Tensor) -> Tensor:
    quantized = copy.deepcopy(layer)
    multiply_in_int8(quantized)
    with torch.no_grad():
        return quantized(x)


def exact(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize(
    "shape_input",
    [lambda x: x, torch.relu, lambda x: -torch.relu(x), lambda x: x + 100, lambda x: 1e-6 * x],
    ids=["both signs", "positive", "negative", "far from 0", "small"],
)
def test_result_is_as_exact_as_7_bits_of_input_allow(layer: QuantizableLinear, shape_input) -> None:
    x = shape_input(torch.randn(3, 50, 64))
    result, truth = in_int8(layer, x), exact(layer, x)
    assert result.shape == (3, 50, 48)
    assert not torch.equal(result, truth)  # it was rounded at all
    step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 127
    # Errors of 64 inputs and weights, each up to half a step, add up as random ones do.
    rounding = (step * layer.weight.norm(dim=1) + x.abs().max() * layer.weight.abs().amax(1) / 127 * 8) / 12**0.5
    assert ((result - truth).abs() <= 6 * rounding).all()


@pytest.mark.parametrize("x", [torch.zeros(4, 64), torch.empty(0, 64)], ids=["zeros", "nothing"])
def test_input_without_a_range(layer: QuantizableLinear, x: Tensor) -> None:
    torch.testing.assert_close(in_int8(layer, x), exact(layer, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(layer: QuantizableLinear, value: float) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = value
    assert in_int8(layer, x).isfinite().all(1).tolist() == [True, True, False, True]


def test_gradients_are_those_of_the_weights(layer: QuantizableLinear) -> None:
    multiply_in_int8(layer)
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), exact(layer, x), rtol=0, atol=0)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_changed_weights_are_rounded_again(layer: QuantizableLinear) -> None:
    multiply_in_int8(layer)
    x = torch.randn(4, 64)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.load_state_dict({"weight": torch.zeros(48, 64), "bias": torch.ones(48)})
        torch.testing.assert_close(layer(x), torch.ones(4, 48))


def train_in_between(layer: QuantizableLinear, x: Tensor, optimizer: ClippedAdamW) -> None:
    layer.train()
    layer(x).sum().backward()
    optimizer.step()
    layer.eval()


def train_in_evaluation_mode(layer: QuantizableLinear, x: Tensor, optimizer: ClippedAdamW) -> None:
    layer(x).sum().backward()
    optimizer.step()


def evaluate_in_training_mode(layer: QuantizableLinear, x: Tensor, optimizer: ClippedAdamW) -> None:
    layer.train()
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x)
    optimizer.step()


def change_the_data(layer: QuantizableLinear, x: Tensor, optimizer: ClippedAdamW) -> None:
    layer.weight.data.mul_(3)
    layer.eval()


@pytest.mark.parametrize(
    "change", [train_in_between, train_in_evaluation_mode, evaluate_in_training_mode, change_the_data]
)
def test_weights_whose_version_does_not_change_are_rounded_again(layer: QuantizableLinear, change: Callable) -> None:
    """The version is the tensor's own count of changes. Fused optimizers do not raise it."""
    optimizer = ClippedAdamW(layer.parameters(), 1.0, max_norm=1.0, norm_type=2.0)
    multiply_in_int8(layer.eval())
    x = torch.randn(4, 64)
    with torch.no_grad():
        layer(x)
    change(layer, x, optimizer)
    with torch.no_grad():
        result = layer(x)
    torch.testing.assert_close(result, in_int8(layer, x), rtol=0, atol=0)


@torch.inference_mode()
def test_a_layer_made_in_inference_mode_can_be_used_and_loaded() -> None:
    layer = QuantizableLinear(64, 48).eval()
    multiply_in_int8(layer)
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer(x), exact(layer, x), rtol=0, atol=0.1)
    layer.load_state_dict({"weight": torch.zeros(48, 64), "bias": torch.ones(48)})
    torch.testing.assert_close(layer(x), torch.ones(4, 48))


def test_used_layer_can_be_copied_and_saved(layer: QuantizableLinear, tmp_path) -> None:
    multiply_in_int8(layer)
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
        torch.save(layer, tmp_path / "layer.pt")
        torch.testing.assert_close(torch.load(tmp_path / "layer.pt", weights_only=False)(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["TEST.QUANTIZE", "int4"], "TEST.QUANTIZE is 'int4'; it must be one of none, int8"),
        (["MODEL.DEVICE", "cuda"], "MODEL.DEVICE is cuda; int8 is for a CPU"),
        (["TEST.AMP.ENABLED", True], "TEST.AMP.ENABLED is True"),
    ],
)
def test_what_does_not_go_together_is_named(values: list, message: str, tiny_cfg: CfgNode) -> None:
    tiny_cfg.merge_from_list(["TEST.QUANTIZE", "int8", *values])
    with pytest.raises(ValueError, match=message):
        int8_of_config(tiny_cfg)
