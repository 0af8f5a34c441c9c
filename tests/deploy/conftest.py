"""A detector whose trace takes seconds, and its file, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import Tensor, nn

from dino_d2 import DINO
from dino_d2.deploy.export import export_onnx


class ThreeConvolutions(Backbone):
    """A map of stride 16, with few operators to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=4, padding=3), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"stage3": self.convolutions(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"stage3": ShapeSpec(channels=32, stride=16)}


@BACKBONE_REGISTRY.register()
def build_three_convolutions(cfg: CfgNode, input_shape: ShapeSpec) -> ThreeConvolutions:
    return ThreeConvolutions()


@pytest.fixture(scope="session")
def small_cfg(tiny_config: Callable[..., CfgNode]) -> CfgNode:
    """Duplicates are dropped after voting, images are made smaller, classes have names."""
    cfg = tiny_config(NMS_THRESHOLD=0.01, BOX_VOTING=True, CLASS_NAMES=["ant", "bee", "cat", "dog", "elk"])
    cfg.MODEL.BACKBONE.NAME = "build_three_convolutions"
    cfg.MODEL.DINO.IN_FEATURES, cfg.MODEL.DINO.NUM_FEATURE_LEVELS = ["stage3"], 2
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 120, 200
    cfg.TEST.DETECTIONS_PER_IMAGE = 30  # of 100 pairs
    cfg.DATASETS.TEST = ()
    return cfg


@pytest.fixture(scope="session")
def small_model(small_cfg: CfgNode) -> DINO:
    """Untrained all scores would be alike and no box would move: the heads are drawn anew.

    Boxes stay large: overlaps of boxes of no size are a matter of rounding.
    """
    torch.manual_seed(0)
    model = build_model(small_cfg).eval()
    proposals = model.query_selection.proposals
    for head in (*model.decoder.class_heads, proposals.class_head):
        nn.init.normal_(head.weight, std=0.3)
    for head in (*model.decoder.box_heads, proposals.box_head):
        nn.init.normal_(head.layers[-1].weight, std=0.1)
    model.assumptions = replace(model.assumptions, score_threshold=0.41)
    return model


@pytest.fixture(scope="session")
def onnx_file(small_cfg: CfgNode, small_model: DINO, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    export_onnx(small_cfg, small_model, path, half=False)
    return path
