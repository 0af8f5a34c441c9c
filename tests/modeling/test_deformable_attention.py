import pytest
import torch
from torch import Tensor

from dino_d2.modeling import deformable_attention
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention


def make_attention(**changes: int) -> MultiScaleDeformableAttention:
    """Two heads, two levels and two points, all directions random."""
    arguments = {"embed_dim": 32, "num_heads": 2, "num_levels": 2, "num_points": 2, **changes}
    attention = MultiScaleDeformableAttention(**arguments).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.fixture
def op_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the layer hands to the op."""
    seen = {}

    def record(value, spatial_shapes, level_start_index, locations, weights):
        seen.update(value=value, locations=locations, weights=weights)
        return value.new_zeros(locations.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    monkeypatch.setattr(deformable_attention, "ms_deform_attn", record)
    return seen


def test_initial_offsets_are_a_ring_of_eight_directions() -> None:
    attention = MultiScaleDeformableAttention(256, num_heads=8, num_levels=4, num_points=4)
    offsets = attention.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for point in range(4):
        expected = torch.tensor(directions) * (point + 1.0)
        for level in range(4):
            torch.testing.assert_close(offsets[:, level, point], expected, atol=1e-5, rtol=0)


def test_initial_attention_is_uniform_whatever_the_query(make_memory, op_arguments: dict) -> None:
    attention = MultiScaleDeformableAttention(32, num_heads=2, num_levels=2, num_points=2).double()
    memory = make_memory()
    for _ in range(2):
        attention(torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 2, dtype=torch.float64), memory)
        torch.testing.assert_close(op_arguments["weights"], torch.full((2, 3, 2, 2, 2), 0.25, dtype=torch.float64))


def test_weights_of_a_head_sum_to_one_over_levels_and_points(make_memory, op_arguments: dict) -> None:
    memory = make_memory()
    make_attention()(torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 2, dtype=torch.float64), memory)
    sums = op_arguments["weights"].sum((-2, -1))
    torch.testing.assert_close(sums, torch.ones(2, 3, 2, dtype=torch.float64))


def test_points_move_by_pixels_of_the_level(make_memory, op_arguments: dict) -> None:
    memory, attention = make_memory(((8, 6), (4, 3))), make_attention()
    query, reference = torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 2, dtype=torch.float64)
    attention(query, reference, memory)
    offsets = attention.sampling_offsets(query).view(2, 3, 2, 2, 2, 2)
    image, q, head, point = 1, 2, 0, 1
    for level, (height, width) in enumerate(memory.spatial_shapes):
        x, y = op_arguments["locations"][image, q, head, level, point].tolist()
        dx, dy = offsets[image, q, head, level, point].tolist()
        assert x == pytest.approx(reference[image, q, level, 0].item() + dx / width)
        assert y == pytest.approx(reference[image, q, level, 1].item() + dy / height)


def test_boxes_move_by_shares_of_their_half_size(make_memory, op_arguments: dict) -> None:
    memory, attention = make_memory(), make_attention(num_points=4)
    query, reference = torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 4, dtype=torch.float64)
    attention(query, reference, memory)
    offsets = attention.sampling_offsets(query).view(2, 3, 2, 2, 4, 2)
    image, q, head, level, point = 1, 2, 1, 0, 3
    x, y = op_arguments["locations"][image, q, head, level, point].tolist()
    dx, dy = offsets[image, q, head, level, point].tolist()
    centre_x, centre_y, width, height = reference[image, q, level].tolist()
    assert x == pytest.approx(centre_x + dx / 4 * width / 2)
    assert y == pytest.approx(centre_y + dy / 4 * height / 2)


def test_padded_tokens_do_not_influence_the_result(make_memory) -> None:
    memory, attention = make_memory(), make_attention()
    query, reference = torch.randn(2, 30, 32, dtype=torch.float64), torch.rand(2, 30, 2, 2, dtype=torch.float64)
    expected = attention(query, reference, memory)
    memory.tokens[memory.padding_mask] = torch.nan
    torch.testing.assert_close(attention(query, reference, memory), expected)


def test_padded_tokens_are_zero_after_the_projection(make_memory) -> None:
    """Before it, the bias would make something of them."""
    memory, attention = make_memory(valid=((0, 0),)), make_attention()
    result = attention(torch.randn(1, 3, 32, dtype=torch.float64), torch.rand(1, 3, 2, 2, dtype=torch.float64), memory)
    torch.testing.assert_close(result, attention.output_proj.bias.expand_as(result))


def test_dimension_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="HIDDEN_DIM 32 must be a multiple of NHEADS 5"):
        make_attention(num_heads=5)
