import torch

from dino_d2.structures import DenoisingQueries, Memory, Pairs, Predictions, Queries, Targets


def denoising_queries(groups: int, group_size: int, batch: int = 1, channels: int = 2) -> DenoisingQueries:
    none = torch.zeros(0, dtype=torch.int64)
    count = groups * group_size
    content, anchors = torch.randn(batch, count, channels), torch.rand(batch, count, 4)
    return DenoisingQueries(content, anchors, group_size, groups, Pairs(none, none, none))


def test_length_of_targets_is_their_number_of_objects() -> None:
    assert len(Targets(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4))) == 3
    assert len(Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))) == 0


def test_token_centres_are_relative_to_the_unpadded_image() -> None:
    memory = Memory(
        tokens=torch.zeros(2, 5, 1),
        padding_mask=torch.zeros(2, 5, dtype=torch.bool),
        spatial_shapes=((2, 2), (1, 1)),
        valid_sizes=torch.tensor([[[2.0, 2.0], [1.0, 1.0]], [[1.0, 2.0], [1.0, 1.0]]]),  # (width, height)
    )
    whole = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75], [0.5, 0.5]]
    left_half = [[0.5, 0.25], [1.5, 0.25], [0.5, 0.75], [1.5, 0.75], [0.5, 0.5]]
    torch.testing.assert_close(memory.token_centres(), torch.tensor([whole, left_half]))


def test_logits_are_float32_at_least() -> None:
    boxes = torch.zeros(1, 1, 4)
    for given, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert Predictions(torch.zeros(1, 1, 3, dtype=given), boxes).logits.dtype == kept


def test_predictions_split_at_a_query() -> None:
    predictions = Predictions(torch.randn(2, 5, 3), torch.rand(2, 5, 4))
    first, rest = predictions.split(2)
    assert torch.equal(torch.cat([first.logits, rest.logits], dim=1), predictions.logits)
    assert torch.equal(torch.cat([first.boxes, rest.boxes], dim=1), predictions.boxes)
    assert first.logits.shape[1] == 2


def test_matching_queries_follow_the_denoising_queries() -> None:
    denoising = denoising_queries(groups=2, group_size=3)
    queries = Queries(torch.randn(1, 4, 2), torch.rand(1, 4, 4))
    together = denoising.concatenated_with(queries)
    assert len(denoising) == 6
    assert torch.equal(together.content[:, :6], denoising.content)
    assert torch.equal(together.content[:, 6:], queries.content)
    assert torch.equal(together.anchors[:, 6:], queries.anchors)


def test_attention_mask_of_two_groups_and_three_matching_queries() -> None:
    mask = denoising_queries(groups=2, group_size=2).attention_mask(3)
    expected = [
        [0, 0, 1, 1, 0, 0, 0],  # a group sees itself and the matching queries
        [0, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],  # matching queries see themselves only
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
    ]
    assert torch.equal(mask, torch.tensor(expected, dtype=torch.bool))


def test_attention_mask_without_denoising_blocks_nothing() -> None:
    for groups in (0, 5):
        assert torch.equal(
            denoising_queries(groups, group_size=0).attention_mask(3), torch.zeros(3, 3, dtype=torch.bool)
        )
