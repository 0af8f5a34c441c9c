"""Average top-k distance against numbers made by hand."""

from __future__ import annotations

import pytest
import torch

from dino_d2.evaluation import average_top_k_distance

BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.6, 0.1, 0.4], [0.9, 0.1, 0.2, 0.2]])
# Away by 0.1 + 0.1, by 0.05 + 0.15 + 0.1 + 0.2, and by nothing.
ANCHORS = torch.tensor([[0.6, 0.5, 0.2, 0.1], [0.25, 0.75, 0.2, 0.2], [0.9, 0.1, 0.2, 0.2]])


@pytest.mark.parametrize(("k", "expected"), [(1, 0.5), (2, 0.35), (3, 0.7 / 3), (100, 0.7 / 3)])
def test_mean_of_the_k_largest_or_of_all_there_are(k: int, expected: float) -> None:
    assert average_top_k_distance(BOXES, ANCHORS, k).item() == pytest.approx(expected)


def test_order_of_the_pairs_does_not_matter() -> None:
    shuffled = torch.tensor([2, 0, 1])
    distance = average_top_k_distance(BOXES[shuffled], ANCHORS[shuffled], 2)
    torch.testing.assert_close(distance, average_top_k_distance(BOXES, ANCHORS, 2))


def test_no_pair_has_no_distance() -> None:
    assert average_top_k_distance(torch.zeros(0, 4), torch.zeros(0, 4), 100).isnan()


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        average_top_k_distance(BOXES, ANCHORS, 0)
