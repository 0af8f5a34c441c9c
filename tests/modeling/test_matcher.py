from __future__ import annotations

import math

import pytest
import torch

from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import Predictions, Targets
from tests.matching import make_predictions, make_targets, triples


def test_cost_of_a_pair_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0]], dtype=torch.float64)  # the left half
    target = Targets(torch.tensor([1]), torch.tensor([[0.75, 0.5, 0.5, 0.5]], dtype=torch.float64))
    p = 1 / (1 + math.exp(-2))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    giou = 0 - (1 - 0.75) / 1  # touching: a hull of 1 holds 0.5 + 0.25
    expected = 2 * focal + 5 * (0.5 + 0.5) - 2 * giou
    cost = HungarianMatcher(2, 5, 2).cost(logits, boxes, target)
    assert cost.shape == (1, 1)
    assert cost.item() == pytest.approx(expected, abs=1e-5)


def test_assignment_has_the_least_sum_not_the_nearest_pair() -> None:
    def at(*centres: float) -> torch.Tensor:
        return torch.tensor([[x, 0.5, 0.1, 0.1] for x in centres])

    predictions = Predictions(torch.zeros(1, 2, 1), at(0.5, 0.2)[None])
    targets = [Targets(torch.zeros(2, dtype=torch.int64), at(0.4, 0.9))]
    (pairs,) = HungarianMatcher(0, 1, 0)([predictions], targets)
    assert triples(pairs) == [(0, 0, 1), (0, 1, 0)]  # 0.4 + 0.2; the nearest pair first: 0.1 + 0.7


def test_class_decides_between_equal_boxes() -> None:
    box = torch.full((1, 3, 4), 0.5)
    predictions = Predictions(torch.tensor([[[3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]]]), box)
    targets = [Targets(torch.tensor([1, 0]), box[0, :2])]
    (pairs,) = HungarianMatcher(2, 5, 2)([predictions], targets)
    assert triples(pairs) == [(0, 0, 1), (0, 1, 0)]


def test_targets_are_counted_through_the_batch_and_images_may_be_empty() -> None:
    (pairs,) = HungarianMatcher(2, 5, 2)([make_predictions(4, 6)], make_targets(0, 2, 0, 3))
    assert sorted((image, target) for image, _, target in triples(pairs)) == [(1, 0), (1, 1), (3, 2), (3, 3), (3, 4)]
    assert len({(image, query) for image, query, _ in triples(pairs)}) == 5


def test_layers_at_once_are_matched_like_one_at_a_time() -> None:
    targets, layers = make_targets(2, 0, 4), [make_predictions(3, queries) for queries in (6, 6, 5)]
    matcher = HungarianMatcher(2, 5, 2)
    alone = [triples(matcher([layer], targets)[0]) for layer in layers]
    assert [triples(pairs) for pairs in matcher(layers, targets)] == alone
    assert alone[0] != alone[1]


def test_nothing_is_matched_without_objects() -> None:
    found = HungarianMatcher(2, 5, 2)([make_predictions(2, 3)] * 2, make_targets(0, 0))
    assert [triples(pairs) for pairs in found] == [[], []]
    assert found[0].query.dtype == torch.int64


def test_each_query_takes_one_object_when_objects_are_more() -> None:
    (pairs,) = HungarianMatcher(2, 5, 2)([make_predictions(1, 3)], make_targets(5))
    assert [query for _, query, _ in triples(pairs)] == [0, 1, 2]
    assert len(set(pairs.target.tolist())) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_diverged_prediction_is_a_bad_match(where: str, bad: float) -> None:
    predictions = make_predictions(1, 3)
    if where == "logits":
        predictions.logits[0, 1] = torch.nan  # infinite logits are a certain class
    else:
        predictions.boxes[0, 1, 2] = bad
    (pairs,) = HungarianMatcher(2, 5, 2)([predictions], make_targets(2))
    assert sorted(pairs.query.tolist()) == [0, 2]
