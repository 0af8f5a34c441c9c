"""Mixed matching and the position-modulated cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dino_d2.geometry import cxcywh_to_xyxy, generalized_iou
from dino_d2.modeling.family.mixed_matching import MixedMatcher, rank_weights, ranks
from dino_d2.modeling.family.position_supervised import PositionModulatedMatcher
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import Pairs, Predictions, Targets
from tests.matching import make_predictions, make_targets, triples

MATCHERS = {
    "plain": HungarianMatcher(2, 5, 2),
    "copies": MixedMatcher(HungarianMatcher(2, 5, 2), 3),
    "modulated": PositionModulatedMatcher(2, 5, 2),
    "both": MixedMatcher(PositionModulatedMatcher(2, 5, 2), 3),
}
each_matcher = pytest.mark.parametrize("matcher", MATCHERS.values(), ids=MATCHERS)


def per_object(pairs: Pairs, objects: int) -> list[int]:
    return pairs.target.bincount(minlength=objects).tolist()


# --- copies


def test_each_object_has_its_copies_everywhere_but_in_the_last_prediction() -> None:
    targets = make_targets(2, 0, 3)
    found = MATCHERS["copies"]([make_predictions(3, 20) for _ in range(3)], targets)
    assert [per_object(pairs, 5) for pairs in found] == [[3] * 5, [3] * 5, [1] * 5]
    for pairs in found:
        assert len({(image, query) for image, query, _ in triples(pairs)}) == len(pairs.query)  # no query twice
        assert all(image == (0, 0, 2, 2, 2)[target] for image, _, target in triples(pairs))
    assert found[-1].weight is None


def test_crowded_images_have_fewer_copies_each_for_itself() -> None:
    """Of 20 queries at most half are given away: 2 objects have 3 each, 5 have 2, 8 have 1, 12 have 1."""
    counts = (2, 5, 8, 12)
    several, once = MATCHERS["copies"]([make_predictions(4, 20)] * 2, make_targets(*counts))
    assert per_object(several, 27) == [3] * 2 + [2] * 5 + [1] * 20
    assert per_object(once, 27) == [1] * 27


@each_matcher
def test_each_query_takes_one_object_when_objects_are_more(matcher: HungarianMatcher) -> None:
    for pairs in matcher([make_predictions(2, 3)] * 2, make_targets(5, 1)):
        assert pairs.query[pairs.image == 0].tolist() == [0, 1, 2]
        assert len(set(pairs.target[pairs.image == 0].tolist())) == 3
        assert (pairs.target[pairs.image == 1] == 5).all()


def test_better_copies_weigh_more() -> None:
    """Three queries of one object, at IoU 1, 1/2 and 1/4, all equally sure of its class."""
    box = torch.tensor([0.5, 0.5, 0.4, 0.4])
    boxes = torch.stack([box * torch.tensor([1, 1, share, 1]) for share in (0.5, 1.0, 0.25, 0.01, 0.01, 0.01)])
    target = [Targets(torch.tensor([0]), box[None])]
    several, once = MATCHERS["copies"]([Predictions(torch.zeros(1, 6, 1), boxes[None])] * 2, target)
    assert several.query.tolist() == [0, 1, 2]
    assert several.weight.tolist() == pytest.approx([math.exp(-1 / 1.5), 1, math.exp(-2 / 1.5)])
    assert once.query.tolist() == [1]


def test_surer_of_two_equal_boxes_is_the_better_copy() -> None:
    logits = torch.tensor([[[-1.0], [2.0]]])
    boxes = torch.full((1, 2, 4), 0.5)
    pairs = Pairs(*torch.tensor([[0, 0], [0, 1], [0, 0]]))
    (weight,) = rank_weights([Predictions(logits, boxes)], [pairs], [Targets(torch.tensor([0]), boxes[0, :1])])
    assert weight.tolist() == pytest.approx([math.exp(-1 / 1.5), 1])


def test_ranks_of_several_groups_at_once() -> None:
    quality = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2, 0.7])
    group = torch.tensor([7, 3, 7, 3, 3, 0])
    assert ranks(quality, group).tolist() == [1, 0, 0, 1, 2, 0]
    assert ranks(quality[:0], group[:0]).tolist() == []


def test_a_layer_is_ranked_as_if_alone() -> None:
    layers, targets = [make_predictions(2, 20) for _ in range(3)], make_targets(2, 3)
    together = MATCHERS["copies"](layers, targets)
    for i in range(2):
        alone, _ = MATCHERS["copies"]([layers[i], layers[-1]], targets)
        assert torch.equal(alone.weight, together[i].weight)


def test_a_single_prediction_is_matched_one_to_one() -> None:
    """As the evaluation of queries asks."""
    targets, layer = make_targets(2, 3), make_predictions(2, 20)
    (found,), (plain,) = MATCHERS["copies"]([layer], targets), MATCHERS["plain"]([layer], targets)
    assert triples(found) == triples(plain)
    assert found.weight is None


# --- cost


def modulated_cost_by_hand(logits: Tensor, boxes: Tensor, target: Targets) -> Tensor:
    overlap = generalized_iou(cxcywh_to_xyxy(boxes)[:, None], cxcywh_to_xyxy(target.boxes)[None])
    value = (overlap + 1) / 2
    p = logits.sigmoid()[:, target.labels] * (value / value.max()).sqrt()
    focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    distance = (boxes[:, None] - target.boxes[None]).abs().sum(-1)
    return 2 * focal + 5 * distance - 2 * overlap


def test_modulated_cost_by_hand() -> None:
    predictions, (target,) = make_predictions(1, 6), make_targets(3)
    cost = MATCHERS["modulated"].cost(predictions.logits[0], predictions.boxes[0], target)
    expected = modulated_cost_by_hand(predictions.logits[0], predictions.boxes[0], target)
    torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-5)
    assert MATCHERS["modulated"].cost(predictions.logits[0], predictions.boxes[0], make_targets(0)[0]).shape == (6, 0)


def test_surer_query_far_away_loses_only_if_modulated() -> None:
    target = [Targets(torch.tensor([0]), torch.tensor([[0.3, 0.3, 0.2, 0.2]]))]
    boxes = torch.tensor([[[0.3, 0.3, 0.19, 0.2], [0.45, 0.45, 0.2, 0.2]]])
    predictions = Predictions(torch.tensor([[[-0.5], [0.3]]]), boxes)
    plain, modulated = (
        kind(2, 0, 0)([predictions], target)[0] for kind in (HungarianMatcher, PositionModulatedMatcher)
    )
    assert (plain.query.tolist(), modulated.query.tolist()) == ([1], [0])


# --- both


@each_matcher
def test_image_in_a_batch_is_matched_as_if_alone(matcher: HungarianMatcher) -> None:
    counts = (3, 0, 14, 2)
    targets, layers = make_targets(*counts), [make_predictions(4, 20) for _ in range(3)]
    together = matcher(layers, targets)
    for i, target in enumerate(targets):
        first = sum(counts[:i])
        alone = matcher([Predictions(x.logits[i : i + 1], x.boxes[i : i + 1]) for x in layers], [target])
        for pairs, of_image in zip(together, alone, strict=True):
            mine = pairs.image == i
            assert torch.equal(pairs.query[mine], of_image.query)
            assert torch.equal(pairs.target[mine], of_image.target + first)
            if pairs.weight is not None:
                assert torch.equal(pairs.weight[mine], of_image.weight)


@each_matcher
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_diverged_prediction_is_a_bad_match(matcher: HungarianMatcher, where: str, bad: float) -> None:
    predictions, healthy = make_predictions(1, 3), make_predictions(1, 3)
    if where == "logits":
        predictions.logits[0, 1] = torch.nan  # infinite logits are a certain class
    else:
        predictions.boxes[0, 1, 2] = bad
    for pairs in matcher([predictions, predictions], make_targets(2)):
        assert sorted(pairs.query.tolist()) == [0, 2]
    for pairs in matcher([Predictions(healthy.logits * torch.nan, healthy.boxes)] * 2, make_targets(2)):
        assert len(pairs.query) == 2  # somebody must be matched: the losses tell that they are not finite


@each_matcher
def test_nothing_is_matched_without_objects(matcher: HungarianMatcher) -> None:
    found = matcher([make_predictions(2, 3)] * 2, make_targets(0, 0))
    assert [triples(pairs) for pairs in found] == [[], []]
