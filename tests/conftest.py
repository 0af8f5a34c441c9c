"""What every test may use: a fixed seed and a DINO that trains on the CPU in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

from dino_d2 import add_dino_config

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for tensors of this size more only wait for each other, minutes on a busy machine


def _tiny_config(**overrides: Any) -> CfgNode:
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "dino_r50_4scale_12ep.yaml"))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    cfg.MODEL.TIMM.NAME = "mobilenetv2_050"
    c = cfg.MODEL.DINO
    c.IN_FEATURES = ["stage2", "stage3", "stage4"]
    c.HIDDEN_DIM, c.NHEADS, c.DIM_FEEDFORWARD = 64, 4, 64
    c.ENC_LAYERS, c.DEC_LAYERS = 1, 2
    c.NUM_QUERIES, c.NUM_CLASSES = 20, 5
    for name, value in overrides.items():
        cfg.merge_from_list([f"MODEL.DINO.{name.replace('__', '.')}", value])
    return cfg


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., CfgNode]:
    """`tiny_config(LOOK_FORWARD="once", DN__TYPE="dn")`: the tiny config with other keys under MODEL.DINO."""
    return _tiny_config


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """The published recipe with a MobileNet and few, narrow layers."""
    return _tiny_config()
