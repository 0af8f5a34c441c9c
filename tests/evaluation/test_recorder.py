"""Watching the decoder changes nothing and leaves nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from dino_d2.evaluation import DecoderRecorder


def test_outputs_stay_as_they_are_and_the_hook_goes(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).eval()
    recorder = DecoderRecorder(model.decoder)
    image = {"image": torch.rand(3, 64, 96) * 255}
    with torch.no_grad():
        (expected,) = model([image])
        recorder.attach()
        (watched,) = model([image])
        queries, layers = recorder.pop()
        recorder.detach()
    assert torch.equal(watched["instances"].scores, expected["instances"].scores)
    assert torch.equal(watched["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
    assert queries.anchors.shape == (1, 20, 4)
    assert len(layers) == 2
    (again,) = model.postprocess(layers[-1], [image], [(64, 96)])
    assert torch.equal(again["instances"].scores, expected["instances"].scores)
    assert not model.decoder._forward_hooks


def test_each_pass_is_taken_once(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).eval()
    recorder = DecoderRecorder(model.decoder)
    recorder.attach()
    with torch.no_grad():
        model([{"image": torch.rand(3, 32, 32) * 255}])
    recorder.pop()
    with pytest.raises(RuntimeError, match="has not run since"):
        recorder.pop()


def test_attaching_twice_leaves_one_hook(tiny_cfg: CfgNode) -> None:
    decoder = build_model(tiny_cfg).decoder
    recorder = DecoderRecorder(decoder)
    recorder.attach()
    recorder.attach()
    assert len(decoder._forward_hooks) == 1
    recorder.detach()
    recorder.detach()
    assert not decoder._forward_hooks


def test_forgotten_recorder_takes_its_hook_along(tiny_cfg: CfgNode) -> None:
    decoder = build_model(tiny_cfg).decoder
    recorder = DecoderRecorder(decoder)
    recorder.attach()
    del recorder
    gc.collect()
    assert not decoder._forward_hooks
