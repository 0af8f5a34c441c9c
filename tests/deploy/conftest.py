"""A detector whose trace takes seconds, and its file, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import Tensor, nn

from dino_d2 import DINO
from dino_d2.deploy.export import export_onnx


class FourConvolutions(Backbone):
    """Strides 8, 16 and 32, with few operators to trace."""

    CHANNELS = (16, 24, 32)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=4, padding=3)
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip((16, 16, 24), self.CHANNELS, strict=True)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x).relu(), {}
        for i, stage in enumerate(self.stages):
            x = maps[f"stage{i + 2}"] = stage(x).relu()
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"stage{i + 2}": ShapeSpec(channels, stride=8 * 2**i) for i, channels in enumerate(self.CHANNELS)}


@BACKBONE_REGISTRY.register()
def build_four_convolutions(cfg: CfgNode, input_shape: ShapeSpec) -> FourConvolutions:
    return FourConvolutions()


@pytest.fixture(scope="session")
def small_cfg(tiny_config: Callable[..., CfgNode]) -> CfgNode:
    """Duplicates are dropped, images are made smaller, classes have names."""
    cfg = tiny_config(DEC_LAYERS=2, NMS_THRESHOLD=0.5, CLASS_NAMES=["ant", "bee", "cat", "dog", "elk"])
    cfg.MODEL.BACKBONE.NAME = "build_four_convolutions"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 120, 200
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture(scope="session")
def small_model(small_cfg: CfgNode) -> DINO:
    """Untrained all scores would be alike and no box would move: the heads are drawn anew."""
    torch.manual_seed(0)
    model = build_model(small_cfg).eval()
    for name, parameter in model.named_parameters():
        if "head" in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def quick_traces() -> Iterator[None]:
    """No stack trace for every node: a fifth of the time."""
    before, torch.fx.config.do_not_emit_stack_traces = torch.fx.config.do_not_emit_stack_traces, True
    yield
    torch.fx.config.do_not_emit_stack_traces = before


@pytest.fixture(scope="session")
def onnx_file(
    small_cfg: CfgNode, small_model: DINO, quick_traces: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    export_onnx(small_cfg, small_model, path, half=False)
    return path
