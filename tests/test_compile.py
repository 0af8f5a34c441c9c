"""torch.compile: no graph break, any shape, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import Tensor, nn

from dino_d2 import DINO
from dino_d2.meta_arch.dino import padding_of
from tests.synthetic import make_batch

# The second shape is to run on the first one's graph.
STANCES = ["default", "fail_on_recompile"]
# No map of one pixel, no size that equals another or a constant of the model: all are special to a tracer.
SHAPES = [(5, 416, 352), (2, 352, 480)]


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch.compiler.reset()


def compiled(function: Callable, backend: str = "aot_eager") -> Callable:
    """`aot_eager` traces forward and backward pass as inductor does and then runs the operators one by one."""
    return torch.compile(function, dynamic=True, fullgraph=True, backend=backend)


class Stem(Backbone):
    """Three convolutions: the sizes of a real backbone's maps, which take a tracer minutes, are not what is tested."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, stride, 1) for c, stride in ((3, 8), (8, 2), (8, 2)))
        self._out_features = ["fine", "middle", "coarse"]
        self._out_feature_channels = dict.fromkeys(self._out_features, 8)
        self._out_feature_strides = dict(zip(self._out_features, (8, 16, 32), strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, layer in zip(self._out_features, self.layers, strict=True):
            maps[name] = x = layer(x)
        return maps


@BACKBONE_REGISTRY.register()
def build_stem(cfg: CfgNode, input_shape: ShapeSpec) -> Stem:
    return Stem()


def make_model(cfg: CfgNode) -> DINO:
    """In float64, so that nothing is chosen differently; queries spread over image and classes."""
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DINO.IN_FEATURES = "build_stem", ["fine", "middle", "coarse"]
    model = build_model(cfg).double()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model


def images_of(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Images and their padding."""
    batch, height, width = shape
    images = torch.randn(batch, 3, height, width, dtype=torch.float64)
    sizes = torch.tensor([[height - 8 * i, width - 8 * i] for i in range(batch)])
    return images, padding_of(sizes, height, width)


def test_prediction_of_several_shapes(tiny_cfg: CfgNode) -> None:
    model = make_model(tiny_cfg).eval()
    predict = compiled(model.predict)
    with torch.no_grad():
        for shape, stance in zip(SHAPES, STANCES, strict=True):
            images, mask = images_of(shape)
            expected = model.predict(images, mask)
            with torch.compiler.set_stance(stance):
                found = predict(images, mask)
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.boxes, expected.boxes)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_losses_and_gradients_with_a_compiled_part(part: str, tiny_cfg: CfgNode) -> None:
    """In place, as a user would: names of parameters and checkpoints stay. No image is padded."""
    model = make_model(tiny_cfg)
    names = list(model.state_dict())
    batches = [make_batch([3, 1, 0, 2, 4], *SHAPES[0][1:]), make_batch([5, 0], *SHAPES[1][1:])]
    results = []
    for compile_it in (False, True):
        if compile_it:
            getattr(model, part).compile(dynamic=True, fullgraph=True, backend="aot_eager")
        for number, (batch, stance) in enumerate(zip(batches, STANCES, strict=True)):
            torch.manual_seed(number)
            model.zero_grad()
            with torch.compiler.set_stance(stance):
                losses = model(batch)
                sum(losses.values()).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
    assert list(model.state_dict()) == names
    for eager, graph in zip(results[: len(batches)], results[len(batches) :], strict=True):
        for a, b in zip(eager, graph, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(b[name], a[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_compiled_to_machine_code(tiny_cfg: CfgNode) -> None:
    model = make_model(tiny_cfg).eval()
    encoder = compiled(model.encoder, backend="inductor")
    with torch.no_grad():
        images, mask = images_of(SHAPES[0])
        features = model.neck([model.backbone(images)[name] for name in model.in_features])
        torch.testing.assert_close(encoder(features, mask).tokens, model.encoder(features, mask).tokens)
