"""The successors' class losses by hand, and what all of them have in common."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dino_d2.modeling.build import CLASS_LOSSES
from dino_d2.modeling.losses import focal_loss
from dino_d2.structures import Pairs, Predictions

each_loss = pytest.mark.parametrize("class_loss", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
LABELS = torch.tensor([1, 0])
LOGITS = torch.tensor([[[0.5, 1.0], [-2.0, 0.0], [-1.0, 0.5]]], dtype=torch.float64)
BOXES = torch.full((1, 3, 4), 0.5, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(logit: float, target: float) -> float:
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def pairs_of(*pairs: tuple[int, int, int], weight: Tensor | None = None) -> Pairs:
    return Pairs(*torch.tensor(pairs, dtype=torch.int64).view(-1, 3).T, weight)


# Query 0 is paired with an object of class 1 at an IoU of 0.6, query 2 with one of class 0 at 0.3.
PAIRS, IOU = pairs_of((0, 0, 0), (0, 2, 1)), torch.tensor([0.6, 0.3], dtype=torch.float64)
BACKGROUND = [0.5, -2.0, 0.0, 0.5]  # logits of the other classes and of query 1


def loss_of(name: str, pairs: Pairs = PAIRS, iou: Tensor = IOU, logits: Tensor = LOGITS) -> float:
    loss, weight = CLASS_LOSSES[name](Predictions(logits, BOXES), pairs, LABELS, iou)
    assert weight is pairs.weight
    return loss.item()


def test_iou_aware_loss_by_hand() -> None:
    expected = sum(sigmoid(x) ** 2 * cross_entropy(x, 0) for x in BACKGROUND)
    for logit, iou in ((1.0, 0.6), (-1.0, 0.3)):
        expected += cross_entropy(logit, sigmoid(logit) ** 0.25 * iou**0.75)
    assert loss_of("iou_aware") == pytest.approx(expected)


def test_iou_aware_target_is_never_zero() -> None:
    found = loss_of("iou_aware", iou=torch.zeros(2, dtype=torch.float64))
    expected = sum(sigmoid(x) ** 2 * cross_entropy(x, 0) for x in BACKGROUND)
    assert found == pytest.approx(expected + cross_entropy(1.0, 0.01) + cross_entropy(-1.0, 0.01))


def test_matchability_loss_by_hand() -> None:
    expected = sum(sigmoid(x) ** 1.5 * cross_entropy(x, 0) for x in BACKGROUND)
    expected += cross_entropy(1.0, 0.6**1.5) + cross_entropy(-1.0, 0.3**1.5)
    assert loss_of("matchability") == pytest.approx(expected)


def test_position_supervised_loss_by_hand() -> None:
    """The best pair of the image has the target 1, the other one as much less as its IoU^2 is less."""
    expected = sum(0.75 * sigmoid(x) ** 2 * cross_entropy(x, 0) for x in BACKGROUND)
    for logit, target in ((1.0, 1.0), (-1.0, 0.3**2 / 0.6**2)):
        expected += 0.25 * (target - sigmoid(logit)) ** 2 * cross_entropy(logit, target)
    assert loss_of("position_supervised") == pytest.approx(expected, rel=1e-6)


def test_position_supervised_target_is_raised_image_by_image() -> None:
    logits = LOGITS.repeat(2, 1, 1)
    pairs = pairs_of((0, 0, 0), (1, 2, 1))
    each_alone = sum(
        loss_of("position_supervised", pairs_of((0, query, target)), torch.ones(1, dtype=torch.float64))
        for query, target in ((0, 0), (2, 1))
    )
    found, _ = CLASS_LOSSES["position_supervised"](Predictions(logits, BOXES), pairs, LABELS, IOU)
    assert found.item() == pytest.approx(each_alone, rel=1e-6)


@each_loss
def test_queries_without_object_are_background(class_loss) -> None:
    loss, _ = class_loss(Predictions(LOGITS, BOXES), pairs_of(), LABELS, torch.zeros(0, dtype=torch.float64))
    colder, _ = class_loss(Predictions(LOGITS - 1, BOXES), pairs_of(), LABELS, torch.zeros(0, dtype=torch.float64))
    assert 0 < colder < loss


@each_loss
def test_a_good_pair_is_taught_a_higher_score_than_its_low_one(class_loss) -> None:
    logits = torch.full((1, 3, 2), -3.0, dtype=torch.float64, requires_grad=True)
    loss, _ = class_loss(Predictions(logits, BOXES), PAIRS, LABELS, IOU)
    loss.backward()
    assert (logits.grad[PAIRS.class_logits(LABELS)] < 0).all()
    assert (logits.grad < 0).sum() == 2


@each_loss
def test_weight_of_a_pair_lowers_its_target(class_loss) -> None:
    """With the weight 0 a pair is background in all but the shape of its loss: a higher score always costs."""
    logits = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64)
    pairs = pairs_of((0, 0, 0), (0, 2, 1), weight=weight)
    loss, box_weight = class_loss(Predictions(logits, BOXES), pairs, LABELS, torch.ones(2, dtype=torch.float64))
    assert box_weight is weight
    loss.backward()
    first, second = logits.grad[pairs.class_logits(LABELS)]
    assert first < 0 < second


@each_loss
def test_weights_of_one_are_no_weights(class_loss) -> None:
    ones = pairs_of((0, 0, 0), (0, 2, 1), weight=torch.ones(2, dtype=torch.float64))
    predictions = Predictions(LOGITS, BOXES)
    assert class_loss(predictions, ones, LABELS, IOU)[0] == class_loss(predictions, PAIRS, LABELS, IOU)[0]


@each_loss
def test_sure_predictions_stay_finite(class_loss) -> None:
    logits = torch.tensor([[[200.0, -200.0], [0.0, 90.0], [-90.0, 200.0]]], requires_grad=True)
    loss, _ = class_loss(Predictions(logits, BOXES.float()), PAIRS, LABELS, IOU.float())
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_focal_loss_ignores_the_iou() -> None:
    losses = [focal_loss(Predictions(LOGITS, BOXES), PAIRS, LABELS, iou)[0] for iou in (IOU, 1 - IOU)]
    assert losses[0] == losses[1]
