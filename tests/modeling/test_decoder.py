import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dino_d2.modeling.box_refinement import look_forward_once, look_forward_twice
from dino_d2.modeling.decoder import DecoderLayer, DINODecoder
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.modeling.layers import FeedForward
from dino_d2.structures import Queries

CHANNELS, CLASSES = 32, 5


def make_decoder(num_layers: int = 3, refine: Callable = look_forward_twice, share_heads: bool = True) -> DINODecoder:
    layers = [
        DecoderLayer(
            nn.MultiheadAttention(CHANNELS, 2, batch_first=True),
            MultiScaleDeformableAttention(CHANNELS, 2, num_levels=2, num_points=2),
            FeedForward(CHANNELS, 48, 0.0),
        )
        for _ in range(num_layers)
    ]
    return DINODecoder(layers, CHANNELS, CLASSES, refine, share_heads).double()


def let_boxes_move(decoder: DINODecoder) -> None:
    for head in decoder.box_heads:
        nn.init.normal_(head.layers[-1].weight, std=0.5)


def make_queries(count: int = 7) -> Queries:
    return Queries(
        torch.randn(2, count, CHANNELS, dtype=torch.float64),
        torch.rand(2, count, 4, dtype=torch.float64) * 0.8 + 0.1,
    )


def gets_gradient(loss: Tensor, module: nn.Module) -> bool:
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(gradient is not None and gradient.any() for gradient in gradients)


def test_every_layer_predicts_for_every_query(make_memory) -> None:
    predictions = make_decoder()(make_queries(), make_memory())
    assert len(predictions) == 3
    assert all(p.logits.shape == (2, 7, CLASSES) and p.boxes.shape == (2, 7, 4) for p in predictions)


def test_untrained_decoder_leaves_the_anchors_where_they_are(make_memory) -> None:
    queries = make_queries()
    for predictions in make_decoder()(queries, make_memory()):
        torch.testing.assert_close(predictions.boxes, queries.anchors)


def test_untrained_classes_have_the_prior_probability(make_memory) -> None:
    decoder = make_decoder()
    nn.init.zeros_(decoder.class_heads[0].weight)
    probability = decoder(make_queries(), make_memory())[-1].logits.sigmoid()
    torch.testing.assert_close(probability, torch.full_like(probability, 0.01))


@pytest.mark.parametrize(("refine", "reached"), [(look_forward_twice, [False, True, True]),
                                                 (look_forward_once, [False, False, True])])  # fmt: skip
def test_box_loss_reaches_the_box_head_of_the_layer_before_with_twice_only(
    refine: Callable, reached: list[bool], make_memory
) -> None:
    """With a head per layer, boxes are the only way from one layer's loss to another layer's box head."""
    decoder = make_decoder(refine=refine, share_heads=False)
    let_boxes_move(decoder)
    loss = decoder(make_queries(), make_memory())[2].boxes.sum()
    assert [gets_gradient(loss, head) for head in decoder.box_heads] == reached


def test_class_loss_of_the_last_layer_trains_every_layer(make_memory) -> None:
    decoder = make_decoder()
    loss = decoder(make_queries(), make_memory())[-1].logits.square().sum()
    assert all(gets_gradient(loss, layer) for layer in decoder.layers)
    assert gets_gradient(loss, decoder.query_position)


def test_both_look_forwards_predict_the_same(make_memory) -> None:
    queries, memory = make_queries(), make_memory()
    twice, once = make_decoder(), make_decoder(refine=look_forward_once)
    let_boxes_move(twice)
    once.load_state_dict(twice.state_dict())
    for a, b in zip(twice(queries, memory), once(queries, memory), strict=True):
        torch.testing.assert_close(a.boxes, b.boxes)
        torch.testing.assert_close(a.logits, b.logits)


@pytest.mark.parametrize(("share_heads", "heads"), [(True, 1), (False, 3)])
def test_heads_are_shared_or_one_per_layer(share_heads: bool, heads: int) -> None:
    decoder = make_decoder(share_heads=share_heads)
    assert len(decoder.class_heads) == len(decoder.box_heads) == heads
    assert len({id(p) for p in decoder.box_heads.parameters()}) == heads * 6


@pytest.mark.parametrize(("share_heads", "changed"), [(True, [True, True, True]), (False, [False, True, False])])
def test_class_head_speaks_for_its_layer(share_heads: bool, changed: list[bool], make_memory) -> None:
    decoder, queries, memory = make_decoder(share_heads=share_heads), make_queries(), make_memory()
    before = decoder(queries, memory)
    with torch.no_grad():
        decoder.class_heads[1 % len(decoder.class_heads)].bias += 1
    after = decoder(queries, memory)
    assert [not torch.equal(a.logits, b.logits) for a, b in zip(before, after, strict=True)] == changed


def test_next_layer_attends_around_the_refined_box(make_memory) -> None:
    decoder, queries, memory = make_decoder(2), make_queries(), make_memory()
    let_boxes_move(decoder)
    seen = []
    for layer in decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    content = []
    decoder.layers[0].register_forward_hook(lambda _, args, output: content.append(output))
    decoder(queries, memory)
    ratios = memory.valid_ratios.repeat(1, 1, 2)[:, None]
    torch.testing.assert_close(seen[0], queries.anchors[:, :, None] * ratios)
    refined = (decoder.box_heads[0](content[0]) + torch.logit(queries.anchors)).sigmoid()
    torch.testing.assert_close(seen[1], refined[:, :, None] * ratios)
    assert not seen[1].requires_grad


def test_query_position_is_that_of_the_anchor_in_the_padded_first_level(make_memory) -> None:
    decoder, queries = make_decoder(1), make_queries()
    memory = make_memory(valid=((1, 1), (0.5, 2 / 3)))
    seen = []
    decoder.query_position.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder(queries, memory)
    x = queries.anchors[1, 3, 0].item() * 2 / 3
    y = queries.anchors[1, 3, 1].item() * 0.5
    assert seen[0].shape == (2, 7, 2 * CHANNELS)
    assert seen[0][1, 3, 0].item() == pytest.approx(math.sin(2 * math.pi * y))
    assert seen[0][1, 3, CHANNELS // 2].item() == pytest.approx(math.sin(2 * math.pi * x))


def test_blocked_queries_are_not_seen(make_memory) -> None:
    decoder, queries, memory = make_decoder(), make_queries(), make_memory()
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[3:, :3] = True  # the last four do not see the first three
    before = decoder(queries, memory, mask)[-1]
    queries.content[:, :3] += 1
    after = decoder(queries, memory, mask)[-1]
    torch.testing.assert_close(after.logits[:, 3:], before.logits[:, 3:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after.logits[:, :3], before.logits[:, :3])


def test_padded_memory_is_not_seen(make_memory) -> None:
    decoder, queries, memory = make_decoder(), make_queries(), make_memory()
    before = decoder(queries, memory)[-1]
    memory.tokens[memory.padding_mask] = torch.nan
    torch.testing.assert_close(decoder(queries, memory)[-1].logits, before.logits)


def test_layer_is_self_attention_cross_attention_and_feed_forward_with_norms_after(make_memory) -> None:
    """The position is added to what asks and is asked for, never to what is carried."""
    layer, memory = make_decoder(1).layers[0], make_memory()
    nn.init.normal_(layer.cross_attn.sampling_offsets.weight)
    content, position = (torch.randn(2, 7, CHANNELS, dtype=torch.float64) for _ in range(2))
    reference = torch.rand(2, 7, 2, 4, dtype=torch.float64)
    query = content + position
    x = layer.self_attn_norm(content + layer.self_attn(query, query, content)[0])
    x = layer.cross_attn_norm(x + layer.cross_attn(x + position, reference, memory))
    x = layer.ffn.norm(x + layer.ffn.linear2(layer.ffn.linear1(x).relu()))
    torch.testing.assert_close(layer(content, position, reference, memory, None), x)


def test_heads_read_the_normed_output_and_the_anchor_comes_from_the_plain_one(make_memory) -> None:
    decoder, queries, memory = make_decoder(1), make_queries(), make_memory()
    let_boxes_move(decoder)
    nn.init.normal_(decoder.norm.bias)
    content = []
    decoder.layers[0].register_forward_hook(lambda _, args, output: content.append(output))
    (predictions,) = decoder(queries, memory)
    normed = decoder.norm(content[0])
    torch.testing.assert_close(predictions.logits, decoder.class_heads[0](normed))
    boxes = (decoder.box_heads[0](normed) + torch.logit(queries.anchors)).sigmoid()
    torch.testing.assert_close(predictions.boxes, boxes)
