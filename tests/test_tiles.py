from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from dino_d2.tiles import predict_in_tiles, spread


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(1249, 400, 100), (400, 400, 100), (10, 400, 0), (801, 400, 0)]
)
def test_tiles_cover_everything_and_overlap_enough(length: int, size: int, overlap: int) -> None:
    tiles = spread(length, size, overlap)
    assert tiles[0][0] == 0
    assert tiles[-1][1] == length
    assert all(end - start <= size for start, end in tiles)
    assert all(end - start >= overlap for (_, end), (start, _) in zip(tiles[:-1], tiles[1:], strict=True))


def test_overlap_as_large_as_the_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap of 400"):
        spread(1000, 400, 400)


def white_squares(picture: np.ndarray) -> Instances:
    """A detector of isolated white pixels: a box of 1 pixel each, scored by its column."""
    rows, columns = np.nonzero(picture[:, :, 0])
    boxes = torch.tensor(np.stack([columns, rows, columns + 1, rows + 1], axis=1), dtype=torch.float32)
    instances = Instances(picture.shape[:2])
    instances.pred_boxes = Boxes(boxes.view(-1, 4))
    instances.scores = torch.rand(len(rows))
    instances.pred_classes = torch.zeros(len(rows), dtype=torch.int64)
    return instances


def test_every_object_is_found_once_where_it_is() -> None:
    rng = np.random.default_rng(0)
    picture = np.zeros((230, 310, 3), np.uint8)
    places = {(int(y), int(x)) for y, x in zip(rng.integers(0, 230, 80), rng.integers(0, 310, 80), strict=True)}
    for y, x in places:
        picture[y, x] = 255
    found = predict_in_tiles(white_squares, picture, size=100, overlap=30)
    assert {(int(box[1]), int(box[0])) for box in found.pred_boxes.tensor} == places
    assert len(found) == len(places)
    assert found.image_size == (230, 310)
    assert (found.scores[:-1] >= found.scores[1:]).all()
