"""Random objects and predictions to match, with boxes that overlap."""

from __future__ import annotations

import torch

from dino_d2.structures import Pairs, Predictions, Targets


def make_targets(*counts: int) -> list[Targets]:
    return [Targets(torch.randint(3, (n,)), torch.rand(n, 4) * 0.4 + 0.3) for n in counts]


def make_predictions(batch: int, queries: int) -> Predictions:
    return Predictions(torch.randn(batch, queries, 3), torch.rand(batch, queries, 4) * 0.4 + 0.3)


def triples(pairs: Pairs) -> list[tuple[int, int, int]]:
    return sorted(zip(pairs.image.tolist(), pairs.query.tolist(), pairs.target.tolist(), strict=True))
