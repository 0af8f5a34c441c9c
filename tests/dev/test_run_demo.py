"""How dev/run_demo.py measures a whole photograph, which has more trees than COCO counts detections."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from dino_d2 import load_config
from dino_d2.evaluation import APSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))

import run_demo
from demo_data import Photo


def test_every_tree_of_a_photograph_counts() -> None:
    corners = np.stack(np.meshgrid(np.arange(0, 300, 20), np.arange(0, 300, 20)), axis=-1).reshape(-1, 2)
    trees = np.hstack([corners, corners + 10]).astype(float)  # 225
    found = Instances((300, 300), pred_boxes=Boxes(torch.from_numpy(trees).float()))
    found.scores, found.pred_classes = torch.ones(len(trees)), torch.zeros(len(trees), dtype=torch.int64)
    photo = Photo(np.zeros((300, 300, 3), np.uint8), trees)
    settings = APSettings.of_config(load_config(str(Path(__file__).parents[2] / run_demo.CONFIG)))
    assert run_demo.evaluate(photo, found, "test_run_demo", settings)["AP"] == pytest.approx(100)
    assert run_demo.evaluate(photo, found, "test_run_demo", APSettings())["AP"] < 50
