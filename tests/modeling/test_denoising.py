from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dino_d2.geometry import cxcywh_to_xyxy
from dino_d2.modeling.box_refinement import look_forward_twice
from dino_d2.modeling.decoder import DecoderLayer, DINODecoder
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.modeling.denoising import (
    ContrastiveDenoising,
    NoDenoising,
    PlainDenoising,
    noise_boxes,
    noise_labels,
)
from dino_d2.modeling.layers import FeedForward
from dino_d2.structures import DenoisingQueries, Queries, Targets

CLASSES, CHANNELS = 6, 32


def make_targets(*counts: int) -> list[Targets]:
    """Images with so many objects each, whose boxes may grow and move by their size without leaving the image."""
    return [
        Targets(
            torch.randint(CLASSES, (count,)),
            torch.rand(count, 4) * torch.tensor([0.2, 0.2, 0.1, 0.1]) + torch.tensor([0.4, 0.4, 0.1, 0.1]),
        )
        for count in counts
    ]


def make_denoising(kind: type = ContrastiveDenoising, **changes) -> PlainDenoising:
    options = {
        "number": 100,
        "label_noise_ratio": 0.5,
        "box_noise_scale": 1.0,
        "reorder_negatives": False,
        "max_queries": 0,
        **changes,
    }
    return kind(CLASSES, CHANNELS, **options)


def moves(boxes: Tensor, noised: Tensor) -> Tensor:
    """By how many half sides each corner coordinate moved, with its sign."""
    half = boxes[..., 2:].repeat_interleave(2, dim=-1).unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2) / 2
    return (cxcywh_to_xyxy(noised) - cxcywh_to_xyxy(boxes)) / half


# --- noise


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("least", [0, 1])
def test_corners_move_by_least_to_least_plus_one_half_sides(least: int, scale: float) -> None:
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64).expand(5000, 4)
    moved = moves(boxes, noise_boxes(boxes, scale, torch.tensor(least), reorder=False)) / scale
    assert moved.abs().min() >= least - 1e-9
    assert moved.abs().max() < least + 1 + 1e-9
    assert moved.abs().mean(0).tolist() == pytest.approx([least + 0.5] * 4, abs=0.03)  # uniform
    assert (moved > 0).double().mean(0).tolist() == pytest.approx([0.5] * 4, abs=0.04)  # to either side


def test_coordinates_move_independently() -> None:
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64).expand(5000, 4)
    correlation = moves(boxes, noise_boxes(boxes, 1.0, torch.tensor(0), reorder=False)).T.corrcoef()
    torch.testing.assert_close(correlation, torch.eye(4, dtype=torch.float64), rtol=0, atol=0.06)


@pytest.mark.parametrize("reorder", [False, True])
def test_noised_boxes_stay_in_the_image(reorder: bool) -> None:
    boxes = torch.tensor([[0.05, 0.9, 0.1, 0.2], [0.5, 0.5, 1.0, 1.0]]).repeat(200, 1)
    corners = cxcywh_to_xyxy(noise_boxes(boxes, 1.0, torch.tensor(1), reorder))
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6


@pytest.mark.parametrize("reorder", [False, True])
def test_no_box_noise_leaves_boxes_alone(reorder: bool) -> None:
    boxes = torch.tensor([[0.3, 0.6, 0.1, 0.2]])
    torch.testing.assert_close(noise_boxes(boxes, 0.0, torch.tensor(1), reorder), boxes)


def test_seven_of_sixteen_negatives_are_inverted_unless_reordered() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64).expand(20000, 4)
    as_published = noise_boxes(boxes, 1.0, torch.tensor(1), reorder=False)
    torch.manual_seed(0)
    reordered = noise_boxes(boxes, 1.0, torch.tensor(1), reorder=True)
    assert (as_published[:, 2:] < 0).any(-1).double().mean().item() == pytest.approx(7 / 16, abs=0.015)
    assert (reordered[:, 2:] >= 0).all()
    torch.testing.assert_close(reordered[:, :2], as_published[:, :2])  # the same box, told the right way round
    torch.testing.assert_close(reordered[:, 2:], as_published[:, 2:].abs())


@pytest.mark.parametrize("reorder", [False, True])
def test_positives_are_never_inverted(reorder: bool) -> None:
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64).expand(5000, 4)
    assert (noise_boxes(boxes, 1.0, torch.tensor(0), reorder)[:, 2:] > 0).all()


def test_labels_change_with_half_of_the_ratio_to_any_class() -> None:
    classes, count = 4, 40000
    labels = torch.full((count,), 2)
    noised = noise_labels(labels, classes, ratio=0.5)
    # a quarter is redrawn, and one in four of those draws the class it had
    assert (noised != labels).double().mean().item() == pytest.approx(0.25 * 3 / 4, abs=0.01)
    shares = noised.bincount(minlength=classes).double() / count
    assert shares[[0, 1, 3]].tolist() == pytest.approx([0.25 / 4] * 3, abs=0.006)


def test_no_label_noise_leaves_labels_alone() -> None:
    labels = torch.randint(CLASSES, (100,))
    assert torch.equal(noise_labels(labels, CLASSES, ratio=0.0), labels)


# --- groups and slots


@pytest.mark.parametrize(
    ("most", "groups"), [(1, 100), (3, 33), (40, 2), (50, 2), (51, 1), (100, 1), (101, 1), (150, 1)]
)
def test_fullest_image_decides_the_number_of_groups(most: int, groups: int) -> None:
    queries = make_denoising()(make_targets(1, most))
    assert queries.groups == groups
    assert queries.group_size == 2 * most
    assert queries.content.shape == (2, groups * 2 * most, CHANNELS)
    assert queries.anchors.shape == (2, groups * 2 * most, 4)
    assert len(queries) == groups * 2 * most


def slots_of(queries: DenoisingQueries, x: Tensor, parts: int) -> Tensor:
    """(B, T, …) -> (B, groups, parts, slots, …)."""
    return x.unflatten(1, (queries.groups, parts, queries.group_size // parts))


def test_group_holds_positives_then_negatives() -> None:
    targets = make_targets(3, 3)
    queries = make_denoising()(targets)
    anchors = slots_of(queries, queries.anchors, 2)
    moved = torch.stack([moves(t.boxes, a) for t, a in zip(targets, anchors, strict=True)]).abs()
    assert moved[:, :, 0].max() < 1 + 1e-4
    upright = (anchors[:, :, 1, :, 2:] > 2e-3).repeat(1, 1, 1, 2)  # where negatives turn over, the size is lost
    assert 0.4 < upright.double().mean() < 0.95
    assert moved[:, :, 1][upright].min() > 1 - 1e-4
    assert moved[:, :, 1][upright].max() < 2 + 1e-4


def test_reordered_negatives_keep_their_size() -> None:
    """An inverted box loses its size where it becomes an anchor, since a logit has no place for numbers below 0."""
    targets = make_targets(20)
    for reorder in (False, True):
        queries = make_denoising(reorder_negatives=reorder)(targets)
        sizes = slots_of(queries, queries.anchors, 2)[..., 2:]
        assert (sizes[:, :, 0] > 2e-3).double().mean() > 0.98
        lost = (sizes[:, :, 1] <= 1.1e-3).any(-1).double().mean().item()
        assert lost == pytest.approx(0.0 if reorder else 7 / 16, abs=0.15)


def test_plain_denoising_has_no_negatives() -> None:
    targets = make_targets(3, 3)
    queries = make_denoising(PlainDenoising)(targets)
    assert queries.group_size == 3
    anchors = slots_of(queries, queries.anchors, 1)
    moved = torch.stack([moves(t.boxes, a) for t, a in zip(targets, anchors, strict=True)]).abs()
    assert moved.max() < 1 + 1e-4


def test_content_is_the_embedded_label() -> None:
    targets, denoising = make_targets(2, 4), make_denoising(label_noise_ratio=0.0)
    queries = denoising(targets)
    content = slots_of(queries, queries.content, 2)
    for image, t in enumerate(targets):
        expected = denoising.label_embed(t.labels).expand(queries.groups, 2, -1, -1)
        assert torch.equal(content[image, :, :, : len(t)], expected)


def test_labels_of_positives_and_negatives_are_noised() -> None:
    targets = [Targets(torch.full((50,), 2), make_targets(50)[0].boxes)]
    denoising = make_denoising(number=5000)
    queries = denoising(targets)
    kept = (slots_of(queries, queries.content, 2) == denoising.label_embed.weight[2]).all(-1)
    assert (~kept).double().mean((0, 1, 3)).tolist() == pytest.approx([0.25 * 5 / 6] * 2, abs=0.03)


def test_every_group_is_noised_anew() -> None:
    anchors = make_denoising()(make_targets(1)).anchors[0]
    assert len(anchors.unique(dim=0)) == len(anchors)


def test_slots_that_an_image_does_not_fill_are_empty() -> None:
    queries = make_denoising()(make_targets(1, 4))
    content, anchors = (slots_of(queries, x, 2)[0, :, :, 1:] for x in (queries.content, queries.anchors))
    assert not content.any()
    assert (anchors == 0.5).all()


def test_pairs_join_every_positive_with_its_object() -> None:
    targets, denoising = make_targets(2, 0, 3), make_denoising(label_noise_ratio=0.0, box_noise_scale=0.0)
    queries, pairs = denoising(targets), denoising(targets).pairs
    labels, boxes = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
    assert len(pairs.query) == queries.groups * 5
    assert pairs.target.bincount().tolist() == [queries.groups] * 5
    assert (pairs.query % queries.group_size < 3).all()  # none with a negative
    assert torch.equal(pairs.image, torch.tensor([0, 0, 2, 2, 2])[pairs.target])
    assert torch.equal(queries.content[pairs.image, pairs.query], denoising.label_embed(labels[pairs.target]))
    torch.testing.assert_close(queries.anchors[pairs.image, pairs.query], boxes[pairs.target])
    assert len(torch.stack([pairs.image, pairs.query]).unique(dim=1).T) == len(pairs.query)


# --- no objects, many objects, no denoising


@pytest.mark.parametrize("kind", [ContrastiveDenoising, PlainDenoising])
def test_batch_without_objects_has_no_queries_and_zero_gradient(kind: type) -> None:
    denoising = make_denoising(kind)
    queries = denoising(make_targets(0, 0))
    assert queries.content.shape == (2, 0, CHANNELS)
    assert queries.anchors.shape == (2, 0, 4)
    assert len(queries.pairs.query) == 0
    queries.content.sum().backward()
    assert torch.equal(denoising.label_embed.weight.grad, torch.zeros(CLASSES + 1, CHANNELS))


def test_switched_off_has_no_queries() -> None:
    queries = NoDenoising(CHANNELS)(make_targets(2, 1))
    assert queries.content.shape == (2, 0, CHANNELS)
    assert queries.anchors.shape == (2, 0, 4)
    assert queries.groups == 0
    assert len(queries.pairs.image) == len(queries.pairs.query) == len(queries.pairs.target) == 0


@pytest.mark.parametrize(
    ("objects", "max_queries", "groups", "slots"),
    [(3, 100, 16, 3), (150, 40, 1, 20), (1000, 400, 1, 200), (150, 41, 1, 20), (2, 3, 1, 1)],
)
def test_cap_first_takes_groups_then_objects(objects: int, max_queries: int, groups: int, slots: int) -> None:
    queries = make_denoising(max_queries=max_queries)(make_targets(objects, 1))
    assert (queries.groups, queries.group_size) == (groups, 2 * slots)
    assert len(queries) <= max_queries


def test_pairs_of_a_capped_batch_point_at_the_objects_that_were_denoised() -> None:
    targets = make_targets(30, 2, 25)
    denoising = make_denoising(max_queries=20, label_noise_ratio=0.0, box_noise_scale=0.0)
    queries = denoising(targets)
    pairs = queries.pairs
    boxes = torch.cat([t.boxes for t in targets])
    torch.testing.assert_close(queries.anchors[pairs.image, pairs.query], boxes[pairs.target])
    assert pairs.image.bincount().tolist() == [10, 2, 10]
    assert len(pairs.target.unique()) == 22
    assert (pairs.query < 10).all()


def test_capped_batch_takes_other_objects_each_time() -> None:
    targets, denoising = make_targets(50), make_denoising(max_queries=10)
    assert len(torch.cat([denoising(targets).pairs.target for _ in range(10)]).unique()) > 5


def test_settings_that_leave_no_query_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.DN\.NUMBER"):
        make_denoising(number=0)
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.DN\.MAX_QUERIES"):
        make_denoising(max_queries=1)
    assert len(make_denoising(PlainDenoising, max_queries=1)(make_targets(3))) == 1


# --- isolation


@pytest.fixture
def decode(make_memory):
    """Logits of every layer of a decoder, for denoising queries followed by five matching queries."""
    layers = [
        DecoderLayer(
            nn.MultiheadAttention(CHANNELS, 2, batch_first=True),
            MultiScaleDeformableAttention(CHANNELS, 2, 2, 2),
            FeedForward(CHANNELS, 48, 0.0),
        )
        for _ in range(2)
    ]
    decoder = DINODecoder(layers, CHANNELS, CLASSES, look_forward_twice, share_heads=True).double()
    memory = make_memory()
    matching = Queries(torch.randn(2, 5, CHANNELS).double(), torch.rand(2, 5, 4).double())

    def run(denoising: DenoisingQueries, matching_shift: float = 0.0) -> Tensor:
        queries = denoising.concatenated_with(Queries(matching.content + matching_shift, matching.anchors))
        layers = decoder(queries, memory, denoising.attention_mask(5))
        return torch.stack([layer.logits for layer in layers])

    return run


@pytest.fixture
def three_groups() -> DenoisingQueries:
    queries = make_denoising(number=6)(make_targets(2, 1))
    assert queries.groups == 3
    queries.content, queries.anchors = queries.content.detach().double(), queries.anchors.double()
    return queries


def changed_queries(before: Tensor, after: Tensor) -> list[bool]:
    return ((before - after).abs() > 1e-9).any(-1).any(0).any(0).tolist()


def test_group_influences_neither_other_groups_nor_matching_queries(decode, three_groups: DenoisingQueries) -> None:
    before = decode(three_groups)
    three_groups.content[:, :1] += 1  # one query of the first group of four
    assert changed_queries(before, decode(three_groups)) == [True] * 4 + [False] * (8 + 5)


def test_boxes_of_a_group_influence_neither_other_groups_nor_matching_queries(
    decode, three_groups: DenoisingQueries
) -> None:
    before = decode(three_groups)
    three_groups.anchors[:, 4:5] = 0.9
    assert changed_queries(before, decode(three_groups)) == [False] * 4 + [True] * 4 + [False] * (4 + 5)


def test_denoising_queries_see_the_matching_queries(decode, three_groups: DenoisingQueries) -> None:
    assert all(changed_queries(decode(three_groups), decode(three_groups, matching_shift=1.0)))


def test_matching_queries_decode_as_without_denoising(decode, three_groups: DenoisingQueries) -> None:
    alone = NoDenoising(CHANNELS)(make_targets(2, 1))
    alone.content, alone.anchors = alone.content.double(), alone.anchors.double()
    torch.testing.assert_close(decode(three_groups)[:, :, -5:], decode(alone), rtol=1e-10, atol=1e-10)
