import math

import pytest
import torch

from dino_d2.modeling.position_encoding import anchor_embedding, pixel_embedding


def unpadded(height: int, width: int) -> torch.Tensor:
    return torch.zeros(1, height, width, dtype=torch.bool)


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_padding_does_not_change_the_embedding_inside(offset: float) -> None:
    alone = pixel_embedding(unpadded(3, 5), 16, 20, offset, torch.float64)
    mask = torch.ones(1, 7, 6, dtype=torch.bool)
    mask[:, :3, :5] = False
    padded = pixel_embedding(mask, 16, 20, offset, torch.float64)
    assert padded.shape == (1, 16, 7, 6)
    torch.testing.assert_close(padded[:, :, :3, :5], alone)


def test_images_of_a_batch_are_embedded_by_themselves() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[1, :, 2:] = True
    both = pixel_embedding(masks, 8, 20, 0, torch.float32)
    torch.testing.assert_close(both[:1], pixel_embedding(masks[:1], 8, 20, 0, torch.float32))
    torch.testing.assert_close(both[1:], pixel_embedding(masks[1:], 8, 20, 0, torch.float32))


def test_first_half_describes_y_and_second_half_x() -> None:
    embedding = pixel_embedding(unpadded(4, 6), 16, 20, 0, torch.float64)
    y, x = embedding[0, :8], embedding[0, 8:]
    assert torch.equal(y, y[:, :, :1].expand_as(y))
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert len(y[:, :, 0].T.unique(dim=0)) == 4
    assert len(x[:, 0].T.unique(dim=0)) == 6


def test_sine_and_cosine_of_each_wavelength_alternate() -> None:
    embedding = pixel_embedding(unpadded(4, 5), 8, 20, -0.5, torch.float64)[0]
    row, column = 2, 1
    for half, position, last in ((embedding[:4], row, 4), (embedding[4:], column, 5)):
        angle = (position + 1 - 0.5) / (last + 1e-6) * 2 * math.pi
        slow = angle / 20**0.5
        expected = [math.sin(angle), math.cos(angle), math.sin(slow), math.cos(slow)]
        assert half[:, row, column].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedding_has_the_wanted_dtype(dtype: torch.dtype) -> None:
    assert pixel_embedding(unpadded(2, 2), 8, 20, 0, dtype).dtype == dtype


def test_anchor_embedding_orders_y_x_w_h() -> None:
    anchors = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = []
    for coordinate in (0.2, 0.1, 0.3, 0.4):
        angle = coordinate * 2 * math.pi
        slow = angle / 10000**0.5
        expected += [math.sin(angle), math.cos(angle), math.sin(slow), math.cos(slow)]
    assert anchor_embedding(anchors, 4).tolist() == pytest.approx(expected)


def test_anchor_embedding_keeps_leading_dimensions() -> None:
    assert anchor_embedding(torch.rand(2, 3, 4), 16).shape == (2, 3, 64)
