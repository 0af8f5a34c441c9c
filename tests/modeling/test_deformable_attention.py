from typing import Any

import pytest
import torch
from torch import Tensor

from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.ops import ms_deform_attn_fused_reference


def make_attention(**changes: Any) -> MultiScaleDeformableAttention:
    """Two heads, two levels and two points, all directions random."""
    arguments = {"embed_dim": 32, "num_heads": 2, "num_levels": 2, "num_points": 2, **changes}
    attention = MultiScaleDeformableAttention(**arguments).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


class RecordingOp:
    """Keeps what the layer hands to the op, and computes nothing."""

    def __call__(self, value, spatial_shapes, reference, offsets, logits) -> Tensor:
        self.value, self.reference, self.offsets, self.logits = value, reference, offsets, logits
        return value.new_zeros(offsets.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def test_initial_offsets_are_a_ring_of_eight_directions() -> None:
    attention = MultiScaleDeformableAttention(256, num_heads=8, num_levels=4, num_points=4)
    offsets = attention.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for point in range(4):
        expected = torch.tensor(directions) * (point + 1.0)
        for level in range(4):
            torch.testing.assert_close(offsets[:, level, point], expected, atol=1e-5, rtol=0)


def test_initial_attention_is_uniform_whatever_the_query(make_memory) -> None:
    op = RecordingOp()
    attention = MultiScaleDeformableAttention(32, num_heads=2, num_levels=2, num_points=2, op=op).double()
    memory = make_memory()
    for _ in range(2):
        attention(torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 2, dtype=torch.float64), memory)
        assert op.logits.shape == (2, 3, 2, 2, 2)
        assert not op.logits.any()


def test_op_gets_what_the_layers_predict(make_memory) -> None:
    op = RecordingOp()
    attention, memory = make_attention(op=op), make_memory()
    query, reference = torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 4, dtype=torch.float64)
    attention(query, reference, memory)
    assert op.reference is reference
    torch.testing.assert_close(op.offsets.flatten(2), attention.sampling_offsets(query))
    torch.testing.assert_close(op.logits.flatten(2), attention.attention_weights(query))


def test_compiled_op_and_reference_agree(make_memory) -> None:
    compiled, memory = make_attention(), make_memory()
    plain = make_attention(op=ms_deform_attn_fused_reference)
    plain.load_state_dict(compiled.state_dict())
    query, reference = torch.randn(2, 3, 32, dtype=torch.float64), torch.rand(2, 3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(compiled(query, reference, memory), plain(query, reference, memory))


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
