"""`MODEL.DINO.EXACT_POSITIONS`: weights know it, and a box does not depend on the size of the image around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.checkpoint.convert import ConversionError, from_published, to_published
from tests.checkpoint.test_convert import published_by, resnet_config

EXACT = ("MODEL.DINO.EXACT_POSITIONS", "True")


def test_strides_are_the_backbones_and_twice_as_much_for_each_coarser_level(tiny_config: Callable) -> None:
    encoder = build_model(tiny_config(EXACT_POSITIONS=True)).encoder
    first = encoder.strides[0]
    assert encoder.strides == tuple(first * 2**n for n in range(len(encoder.level_embed)))
    assert build_model(tiny_config()).encoder.strides is None  # as published


@pytest.mark.parametrize("width", [64, 75, 96])
def test_proposals_stay_where_they_are_when_the_image_grows(width: int, tiny_config: Callable) -> None:
    """Anchors before refinement, in pixels: an image that is wider at the right moves none."""
    model = build_model(tiny_config(EXACT_POSITIONS=True)).eval()
    with torch.no_grad():
        narrow, wide = (model.encode(torch.zeros(1, 3, 64, w), None) for w in (64, width))
    columns = narrow.spatial_shapes[0][1]
    places = [memory.token_centres()[0, :columns, 0] * w for memory, w in ((narrow, 64), (wide, width))]
    torch.testing.assert_close(*places)


def test_weights_with_and_without_it_are_told_apart(tmp_path: Path) -> None:
    plain, exact = build_model(resnet_config()), build_model(resnet_config(*EXACT))
    for name, model, other, message in (
        ("plain", plain, exact, "EXACT_POSITIONS is True, the weights are for False"),
        ("exact", exact, plain, "EXACT_POSITIONS is False, the weights are for True"),
    ):
        DINOCheckpointer(model, str(tmp_path)).save(name)
        with pytest.raises(ValueError, match=message):
            DINOCheckpointer(other).load(str(tmp_path / f"{name}.pth"))


def test_published_programs_have_no_such_weights() -> None:
    model = build_model(resnet_config(*EXACT))
    with pytest.raises(ConversionError, match="EXACT_POSITIONS is True, the weights are for False"):
        from_published(published_by("official"), "official", model)
    with pytest.raises(ConversionError, match="EXACT_POSITIONS is True, which official does not have"):
        to_published(model.state_dict(), "official", model)
