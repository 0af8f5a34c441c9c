import pytest
import torch

from dino_d2.modeling.layers import CHUNK_ROWS, FeedForward, apply_in_chunks


@pytest.mark.parametrize("rows", [0, 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
def test_some_rows_at_a_time_give_what_all_give(rows: int) -> None:
    ffn = FeedForward(8, 16, dropout=0.0).double()
    x = torch.randn(2, rows, 8, dtype=torch.float64)
    at_once = ffn(x)
    assert at_once.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), at_once.detach())


def test_rows_at_a_time_are_few_and_only_without_gradient() -> None:
    x = torch.randn(1, CHUNK_ROWS + 1, 4)
    seen = []

    def note(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.numel() // 4)
        return rows + 1

    apply_in_chunks(note, x)
    with torch.no_grad():
        assert torch.equal(apply_in_chunks(note, x), x + 1)
    assert seen == [CHUNK_ROWS + 1, CHUNK_ROWS, 1]


def test_input_is_left_as_it_was() -> None:
    ffn, x = FeedForward(8, 16, dropout=0.0), torch.randn(3, 8)
    before = x.clone()
    with torch.no_grad():
        ffn(x)
    assert torch.equal(x, before)
