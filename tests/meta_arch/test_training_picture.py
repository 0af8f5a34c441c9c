"""detectron2's VIS_PERIOD."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from tests.meta_arch.test_dino import make_input


def shown(model: nn.Module, iteration: int, *inputs: dict) -> dict[str, np.ndarray]:
    with EventStorage(iteration) as storage:
        model.train()(inputs)
    return {name: picture for name, picture, _ in storage._vis_data}


def test_every_so_many_iterations_training_draws_objects_and_detections_of_an_image(tiny_cfg: CfgNode) -> None:
    tiny_cfg.VIS_PERIOD = 10
    tiny_cfg.INPUT.FORMAT = "BGR"
    model = build_model(tiny_cfg)
    image = make_input(96, 128, objects=2) | {"height": 480, "width": 640}  # drawn as trained on, not as in the file
    image["image"] = torch.tensor([200, 100, 0], dtype=torch.uint8)[:, None, None].expand(3, 96, 128)
    pictures = shown(model, 20, image, make_input(64, 64, objects=0))
    (picture,) = pictures.values()
    assert picture.shape == (3, 96, 256)
    left, right = torch.as_tensor(picture).split(128, dim=2)
    background = torch.tensor([0, 100, 200])[:, None, None]  # RGB
    for panel in (left, right):
        drawn = (panel != background).any(0)
        assert 0 < drawn.float().mean() < 1
    assert not torch.equal(left, right)

    assert not shown(model, 21, image)


def test_an_image_without_objects_is_drawn_too(tiny_cfg: CfgNode) -> None:
    tiny_cfg.VIS_PERIOD = 1
    assert len(shown(build_model(tiny_cfg), 0, make_input(64, 64, objects=0))) == 1


def test_the_losses_are_those_without_a_picture(tiny_cfg: CfgNode) -> None:
    image = make_input(64, 64, objects=2)
    totals = []
    for tiny_cfg.VIS_PERIOD in (0, 1):
        torch.manual_seed(0)
        model = build_model(tiny_cfg).train()
        with EventStorage():
            totals.append(sum(model([image]).values()))
    assert torch.equal(*totals)


def test_without_an_event_storage_nothing_is_drawn(tiny_cfg: CfgNode) -> None:
    tiny_cfg.VIS_PERIOD = 1
    build_model(tiny_cfg).train()([make_input(64, 64, objects=1)])
