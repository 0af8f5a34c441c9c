from __future__ import annotations

import math

import pytest
import torch

from dino_d2.modeling.criterion import LossWeights, SetCriterion, boxes_per_process
from dino_d2.modeling.losses import box_losses, focal_loss
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import DenoisingQueries, Pairs, Predictions, Targets

CLASSES = 3


def focal(logit: float, positive: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if positive else 0.75 * p**2 * -math.log(1 - p)


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def make_criterion(classification: float = 1, l1: float = 5, giou: float = 2) -> SetCriterion:
    return SetCriterion(HungarianMatcher(2, 5, 2), LossWeights(classification, l1, giou))


def make_predictions(batch: int, queries: int) -> Predictions:
    return Predictions(torch.randn(batch, queries, CLASSES), torch.rand(batch, queries, 4) * 0.4 + 0.3)


def make_targets(*counts: int) -> list[Targets]:
    return [Targets(torch.randint(CLASSES, (n,)), torch.rand(n, 4) * 0.4 + 0.3) for n in counts]


def denoising_of(batch: int, groups: int, group_size: int, pairs: Pairs | None = None) -> DenoisingQueries:
    count = groups * group_size
    none = Pairs(index(), index(), index())
    return DenoisingQueries(
        torch.zeros(batch, count, 8), torch.zeros(batch, count, 4), group_size, groups, pairs or none
    )


# Two queries. The first is the object but for its width (0.4, not 0.2); the second is nowhere.
LOGITS = torch.tensor([[[1.0, -1.0, 0.5], [-2.0, 0.0, -0.5]]])
BOXES = torch.tensor([[[0.5, 0.5, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1]]])
OBJECT = Targets(index(2), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
CLASS_LOSS = sum(focal(x, positive=i == 2) for i, x in enumerate(LOGITS.flatten().tolist()))
L1_LOSS, GIOU_LOSS = 0.2, 1 - 0.04 / 0.08


def test_class_loss_by_hand() -> None:
    loss, _ = focal_loss(Predictions(LOGITS, BOXES), Pairs(index(0), index(0), index(0)), OBJECT.labels, torch.ones(1))
    assert loss.item() == pytest.approx(CLASS_LOSS)


def test_queries_without_object_are_background() -> None:
    loss, _ = focal_loss(Predictions(LOGITS, BOXES), Pairs(index(), index(), index()), OBJECT.labels, torch.ones(0))
    assert loss.item() == pytest.approx(sum(focal(x, positive=False) for x in LOGITS.flatten().tolist()))


def test_box_losses_by_hand() -> None:
    l1, giou, _ = box_losses(BOXES[0, [0, 0]], torch.cat([OBJECT.boxes, BOXES[0, :1]]))
    assert l1.tolist() == pytest.approx([L1_LOSS, 0], abs=1e-6)
    assert giou.tolist() == pytest.approx([GIOU_LOSS, 0], abs=1e-4)


def test_criterion_by_hand() -> None:
    losses = make_criterion(1, 5, 2)([Predictions(LOGITS, BOXES)], None, denoising_of(1, 0, 0), [OBJECT])
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"loss_ce": CLASS_LOSS, "loss_bbox": 5 * L1_LOSS, "loss_giou": 2 * GIOU_LOSS}, abs=1e-4
    )


def test_sum_over_the_batch_is_divided_by_its_objects() -> None:
    layer = Predictions(LOGITS.repeat(2, 1, 1), BOXES.repeat(2, 1, 1))
    losses = make_criterion(1, 1, 1)([layer], None, denoising_of(2, 0, 0), [OBJECT, OBJECT])
    assert losses["loss_ce"].item() == pytest.approx(CLASS_LOSS)
    assert losses["loss_bbox"].item() == pytest.approx(L1_LOSS)


def names(*suffixes: str) -> set[str]:
    return {f"{loss}{suffix}" for suffix in suffixes for loss in ("loss_ce", "loss_bbox", "loss_giou")}


@pytest.mark.parametrize("counts", [(2, 1), (0, 0)], ids=["objects", "no objects"])
def test_every_layer_its_denoising_part_and_the_proposals_have_three_losses(counts: tuple[int, int]) -> None:
    layers, proposals = [make_predictions(2, 7) for _ in range(3)], make_predictions(2, 5)
    losses = make_criterion()(layers, proposals, denoising_of(2, 1, 2), make_targets(*counts))
    assert set(losses) == names("_0", "_1", "", "_dn_0", "_dn_1", "_dn", "_interm")
    assert all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())


def test_learned_queries_have_no_proposal_losses() -> None:
    losses = make_criterion()([make_predictions(1, 4)], None, denoising_of(1, 1, 1), make_targets(2))
    assert set(losses) == names("", "_dn")


def test_denoising_switched_off_has_no_denoising_losses() -> None:
    losses = make_criterion()([make_predictions(1, 4)], make_predictions(1, 4), denoising_of(1, 0, 0), make_targets(2))
    assert set(losses) == names("", "_interm")


def test_last_layer_has_the_plain_names() -> None:
    layers, targets, off = [make_predictions(1, 4) for _ in range(2)], make_targets(2), denoising_of(1, 0, 0)
    losses = make_criterion()(layers, None, off, targets)
    for suffix, layer in (("_0", layers[0]), ("", layers[1])):
        alone = make_criterion()([layer], None, off, targets)
        assert losses[f"loss_ce{suffix}"] == alone["loss_ce"]
        assert losses[f"loss_giou{suffix}"] == alone["loss_giou"]


def test_weights_are_the_same_everywhere() -> None:
    layers, proposals = [make_predictions(2, 7) for _ in range(2)], make_predictions(2, 5)
    arguments = layers, proposals, denoising_of(2, 1, 2), make_targets(2, 1)
    plain, weighted = make_criterion(1, 1, 1)(*arguments), make_criterion(2, 3, 4)(*arguments)
    for name, loss in weighted.items():
        factor = {"ce": 2, "bbox": 3, "giou": 4}[name.split("_")[1]]
        torch.testing.assert_close(loss, factor * plain[name])


def test_denoising_part_is_paired_as_known_and_divided_by_boxes_times_groups() -> None:
    """Two groups of one positive and one negative, then a matching query: the hand-made layer, twice."""
    layer = Predictions(
        torch.cat([LOGITS, LOGITS, LOGITS[:, :1]], dim=1), torch.cat([BOXES, BOXES, BOXES[:, :1]], dim=1)
    )
    denoising = denoising_of(1, groups=2, group_size=2, pairs=Pairs(index(0, 0), index(0, 2), index(0, 0)))
    losses = make_criterion(1, 1, 1)([layer], None, denoising, [OBJECT])
    assert losses["loss_ce_dn"].item() == pytest.approx(2 * CLASS_LOSS / 2)
    assert losses["loss_bbox_dn"].item() == pytest.approx(2 * L1_LOSS / 2)
    assert losses["loss_giou_dn"].item() == pytest.approx(2 * GIOU_LOSS / 2, abs=1e-4)


def test_denoising_queries_never_take_a_matching_querys_object() -> None:
    """The denoising query is perfect, the matching query is far away and pays for it."""
    boxes = torch.cat([OBJECT.boxes[None], BOXES[:, 1:]], dim=1)
    layer = Predictions(LOGITS, boxes)
    denoising = denoising_of(1, groups=1, group_size=1, pairs=Pairs(index(0), index(0), index(0)))
    losses = make_criterion(1, 1, 1)([layer], None, denoising, [OBJECT])
    assert losses["loss_bbox_dn"].item() == 0
    assert losses["loss_bbox"].item() == pytest.approx(0.4 + 0.4 + 0.1 + 0.1)


def test_number_of_boxes_is_at_least_one() -> None:
    like = torch.zeros(1)
    assert boxes_per_process(0, like) == 1
    assert boxes_per_process(7, like) == 7
