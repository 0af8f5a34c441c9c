import numpy as np
import pytest
import torch
from torch import Tensor

from dino_d2.modeling.encoder import DeformableEncoder
from dino_d2.modeling.layers import MLP
from dino_d2.modeling.query_selection import (
    EncoderProposals,
    MixedQuerySelection,
    PureQuerySelection,
    StaticQueries,
    token_proposals,
)
from dino_d2.structures import Memory

CHANNELS = 32


def make_proposals() -> EncoderProposals:
    return EncoderProposals(CHANNELS, torch.nn.Linear(CHANNELS, 5), MLP(CHANNELS, CHANNELS, 4, 2)).double()


def leaf(memory: Memory) -> Tensor:
    """The tokens, made to collect gradients."""
    return memory.tokens.requires_grad_()


def test_proposals_are_token_centres_with_a_size_per_level(make_memory) -> None:
    logits, valid = token_proposals(make_memory(((4, 8), (2, 4)), valid=((1, 1),)))
    boxes = logits.sigmoid()[0]
    assert valid.all()
    assert boxes[0].tolist() == pytest.approx([0.5 / 8, 0.5 / 4, 0.05, 0.05])
    assert boxes[8 + 3].tolist() == pytest.approx([3.5 / 8, 1.5 / 4, 0.05, 0.05])
    assert boxes[32 + 4 + 1].tolist() == pytest.approx([1.5 / 4, 1.5 / 2, 0.1, 0.1])


def test_proposals_are_relative_to_the_unpadded_image(make_memory) -> None:
    logits, _ = token_proposals(make_memory(((4, 8),), valid=((0.5, 0.25),)))
    assert logits.sigmoid()[0, 8 + 1].tolist() == pytest.approx([1.5 / 2, 1.5 / 2, 0.05, 0.05])


def test_proposals_of_padded_tokens_are_infinite(make_memory) -> None:
    memory = make_memory(((4, 8),), valid=((1, 1), (0.5, 0.25)))
    logits, valid = token_proposals(memory)
    assert torch.equal(valid, ~memory.padding_mask)
    assert logits[~valid].isposinf().all()
    assert logits[valid].isfinite().all()


def test_proposals_at_the_very_border_are_infinite(make_memory) -> None:
    logits, valid = token_proposals(make_memory(((1, 60),), valid=((1, 1),)))
    assert (~valid[0]).nonzero().flatten().tolist() == [0, 59]  # their centres lie within 0.01 of the border
    assert logits[~valid].isposinf().all()


def published_centres(length: int, padded: int, dtype: type) -> np.ndarray:
    """(i + 0.5) / the number of valid tokens, as both published implementations have it."""
    return (np.arange(padded, dtype=dtype) + dtype(0.5)) / dtype(length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 1, 7, 34])
@pytest.mark.parametrize("axis", [0, 1])
def test_centres_and_validity_are_those_of_the_published_programs_bit_for_bit(
    axis: int, padding: int, dtype: torch.dtype
) -> None:
    """Every length up to 200: of 50 and 150 tokens the outermost lie exactly 0.01 from the border."""
    encoder = DeformableEncoder([], embed_dim=4, num_levels=1, temperature=20, offset=0).to(dtype)
    for length in range(2, 201):
        padded = length + padding
        shape = (padded, 4) if axis == 1 else (4, padded)
        mask = torch.zeros(1, *shape, dtype=torch.bool)
        if axis == 1:
            mask[:, length:] = True
        else:
            mask[:, :, length:] = True
        memory = encoder([torch.zeros(1, 4, *shape, dtype=dtype)], mask)
        expected = published_centres(length, padded, np.float32 if dtype == torch.float32 else np.float64)
        centres = memory.token_centres().view(*shape, 2)[..., axis]
        line = centres[:, 0] if axis == 1 else centres[0]
        assert np.array_equal(line.numpy(), expected)
        valid = token_proposals(memory)[1].view(shape)
        line = valid[:, 0] if axis == 1 else valid[0]
        inside = (expected > 0.01) & (expected < 0.99) & (np.arange(padded) < length)
        assert np.array_equal(line.numpy(), inside)
        assert length not in (50, 150) or not line[0]


def test_best_tokens_are_taken_best_first(make_memory) -> None:
    memory, proposals = make_memory(valid=((1, 1),)), make_proposals()
    best = proposals(memory, 7).predictions
    everything = proposals(memory, memory.tokens.shape[1]).predictions
    scores = everything.logits.max(-1).values.sort(descending=True).values
    torch.testing.assert_close(best.logits.max(-1).values, scores[:, :7])


def test_predictions_are_the_heads_of_the_chosen_tokens(make_memory) -> None:
    memory, proposals = make_memory(valid=((1, 1),)), make_proposals()
    best = proposals(memory, 7)
    token = best.tokens[0]
    features = proposals.norm(proposals.project(memory.tokens))[0, token]
    torch.testing.assert_close(best.features[0], features)
    torch.testing.assert_close(best.predictions.logits[0], proposals.class_head(features))
    start = token_proposals(memory)[0][0, token]
    torch.testing.assert_close(best.predictions.boxes[0], (proposals.box_head(features) + start).sigmoid())


def test_invalid_tokens_are_not_read(make_memory) -> None:
    memory, proposals = make_memory(), make_proposals()
    count = memory.tokens.shape[1]
    expected = proposals(memory, count).predictions
    memory.tokens[memory.padding_mask] = torch.nan
    torch.testing.assert_close(proposals(memory, count).predictions.logits, expected.logits)


def test_chosen_invalid_tokens_leave_all_gradients_finite(make_memory) -> None:
    memory, proposals = make_memory(), make_proposals()
    tokens = leaf(memory)
    predictions = proposals(memory, tokens.shape[1]).predictions  # all of them
    (predictions.boxes.sum() + predictions.logits.sum()).backward()
    assert predictions.boxes.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (tokens, *proposals.parameters()))


def test_mixed_anchors_come_from_tokens_without_gradient_and_content_is_learned(make_memory) -> None:
    memory, selection = make_memory(), MixedQuerySelection(6, CHANNELS, make_proposals()).double()
    tokens = leaf(memory)
    queries, proposals = selection(memory).queries, selection(memory).proposals
    assert torch.equal(queries.anchors, proposals.boxes)
    assert not queries.anchors.requires_grad
    assert torch.equal(queries.content, selection.content.weight.expand(2, -1, -1))
    assert torch.autograd.grad(queries.content.sum(), selection.content.weight)[0].any()
    assert torch.autograd.grad(proposals.boxes.sum(), tokens)[0].any()


def test_pure_anchors_and_content_come_from_tokens_without_gradient(make_memory) -> None:
    memory, selection = make_memory(), PureQuerySelection(6, make_proposals())
    tokens = leaf(memory)
    queries, proposals = selection(memory).queries, selection(memory).proposals
    assert torch.equal(queries.anchors, proposals.boxes)
    assert torch.equal(queries.content, selection.proposals(memory, 6).features)
    assert not queries.anchors.requires_grad
    assert not queries.content.requires_grad
    assert torch.autograd.grad(proposals.boxes.sum(), tokens)[0].any()


def test_static_anchors_and_content_are_learned_and_the_same_for_every_image(make_memory) -> None:
    selection = StaticQueries(6, CHANNELS)
    result = selection(make_memory())
    queries = result.queries
    assert result.proposals is None
    assert torch.equal(queries.content[0], queries.content[1])
    assert torch.equal(queries.anchors[0], queries.anchors[1])
    assert ((queries.anchors > 0) & (queries.anchors < 1)).all()
    loss = queries.content.sum() + queries.anchors.sum()
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, list(selection.parameters())))


@pytest.mark.parametrize("kind", ["mixed", "pure"])
def test_fewer_queries_are_the_first_of_more(kind: str, make_memory) -> None:
    memory = make_memory()
    mixed, pure = MixedQuerySelection(6, CHANNELS, make_proposals()).double(), PureQuerySelection(6, make_proposals())
    selection = mixed if kind == "mixed" else pure
    six = selection(memory)
    selection.num_queries = 4
    four = selection(memory)
    assert torch.equal(four.queries.content, six.queries.content[:, :4])
    assert torch.equal(four.queries.anchors, six.queries.anchors[:, :4])
    assert torch.equal(four.proposals.logits, six.proposals.logits[:, :4])


@pytest.mark.parametrize("kind", ["mixed", "pure"])
def test_fewer_tokens_than_queries_make_fewer_queries(kind: str, make_memory) -> None:
    if kind == "mixed":
        selection = MixedQuerySelection(50, CHANNELS, make_proposals())
    else:
        selection = PureQuerySelection(50, make_proposals())
    result = selection(make_memory(((2, 3), (1, 2)), valid=((1, 1), (1, 1))))
    assert result.queries.content.shape == (2, 8, CHANNELS)
    assert result.queries.anchors.shape == (2, 8, 4)
    assert result.proposals.logits.shape == (2, 8, 5)


def scored_at_once(proposals: EncoderProposals, memory: Memory, num_queries: int) -> tuple[Tensor, Tensor]:
    """Logits and boxes with the gradient through all tokens, as the published implementations have it."""
    start, valid = token_proposals(memory)
    features = proposals.norm(proposals.project(memory.tokens.masked_fill(~valid[..., None], 0)))
    logits = proposals.class_head(features)
    best = logits.max(-1).values.topk(num_queries).indices[..., None]
    features, start = (x.gather(1, best.expand(-1, -1, x.shape[-1])) for x in (features, start))
    return logits.gather(1, best.expand(-1, -1, logits.shape[-1])), (proposals.box_head(features) + start).sigmoid()


def test_ranking_without_gradient_changes_no_gradient_and_keeps_less(make_memory) -> None:
    proposals, weights = make_proposals(), None
    results, kept = [], []
    for ours in (True, False):
        torch.manual_seed(0)
        memory = make_memory(((16, 16), (8, 8)))
        tokens = leaf(memory)
        proposals.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x):
            if ours:
                predictions = proposals(memory, 10).predictions
                logits, boxes = predictions.logits, predictions.boxes
            else:
                logits, boxes = scored_at_once(proposals, memory, 10)
        weights = torch.randn_like(logits) if weights is None else weights
        ((logits * weights).sum() + boxes.pow(2).sum()).backward()
        kept.append(sum(sizes))
        results.append([logits, boxes, tokens.grad, *(p.grad for p in proposals.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert kept[0] < 0.5 * kept[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_parameter_has_a_gradient_in_mixed_precision(make_memory, dtype: torch.dtype) -> None:
    proposals = make_proposals().float()
    memory = make_memory(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        predictions = proposals(memory, 10).predictions
    (predictions.logits.sum() + predictions.boxes.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in proposals.parameters())
