"""Data structures passed between the modules. Boxes are cx, cy, w, h in [0, 1] of the unpadded image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .constants import constant


@dataclass
class Targets:
    """The ground truth of one image: `labels` (n,) int64, `boxes` (n, 4). n is 0 without objects."""

    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Memory:
    """The flattened feature levels: N tokens, level by level in raster order.

    tokens: (B, N, C).
    padding_mask: (B, N) bool, True for tokens on padding; None: no image is padded.
    spatial_shapes: (height, width) of each of the L levels, as Python numbers.
    valid_sizes: (B, L, 2), number of unpadded columns and rows of each level: whole and at least 1, or with fractions
        if tokens are placed by their strides.
    """

    tokens: Tensor
    padding_mask: Tensor | None
    spatial_shapes: tuple[tuple[int, int], ...]
    valid_sizes: Tensor

    @property
    def valid_ratios(self) -> Tensor:
        """Unpadded fraction of each level's width and height, (B, L, 2) in (0, 1]."""
        return self.valid_sizes / map_sizes(self.spatial_shapes, self.valid_sizes.dtype, self.valid_sizes.device)

    def token_centres(self) -> Tensor:
        """Centre (x, y) of every token relative to the unpadded image, (B, N, 2), above 1 on padding; (1, N, 2)
        without padding.

        Computed as a single division of two exact numbers, so that 0.5 / 50 compares equal to 0.01: the published
        implementations require tokens strictly inside. Going through the padded map would round either way.
        """
        valid = self.valid_sizes if self.padding_mask is not None else self.valid_sizes[:1]
        pixels = pixel_centres(self.spatial_shapes, valid.dtype, valid.device)
        sizes = [height * width for height, width in self.spatial_shapes]
        levels = zip(pixels.split(sizes), valid.unbind(1), strict=True)
        return torch.cat([level / count[:, None] for level, count in levels], dim=1)

    def without_padding(self, x: Tensor) -> Tensor:
        """Set `x` (B, N, channels) to zero on padding."""
        return x if self.padding_mask is None else x.masked_fill(self.padding_mask[..., None], 0)


@constant
def map_sizes(spatial_shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Width and height of L maps, (L, 2)."""
    one = torch.ones((), dtype=dtype, device=device)  # sizes may be symbolic, which torch.tensor rejects
    return torch.stack([torch.stack([one * width, one * height]) for height, width in spatial_shapes])


@constant
def pixel_centres(spatial_shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centre (x, y) of every pixel of L maps in pixels of its map, level by level in raster order, (N, 2)."""
    centres = []
    for height, width in spatial_shapes:
        y = torch.arange(height, dtype=dtype, device=device) + 0.5
        x = torch.arange(width, dtype=dtype, device=device) + 0.5
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
    return torch.cat(centres)


@dataclass
class Queries:
    """Decoder queries: `content` (B, Q, C) and `anchors` (B, Q, 4)."""

    content: Tensor
    anchors: Tensor


@dataclass
class Predictions:
    """Output of a decoder layer or of the proposals: `logits` (B, Q, classes) and `boxes` (B, Q, 4)."""

    logits: Tensor
    boxes: Tensor

    def __post_init__(self) -> None:
        # Mixed precision ends here: probabilities, losses and rankings need at least float32.
        self.logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    def split(self, first: int) -> tuple[Predictions, Predictions]:
        """The predictions of the first `first` queries and those of the rest."""
        return (
            Predictions(self.logits[:, :first], self.boxes[:, :first]),
            Predictions(self.logits[:, first:], self.boxes[:, first:]),
        )

    def masked(self, keep: Tensor) -> Predictions:
        """Give queries where `keep` (B, Q) bool is False score 0 and an empty box, which postprocessing drops."""
        drop = ~keep[..., None]
        return Predictions(self.logits.masked_fill(drop, -torch.inf), self.boxes.masked_fill(drop, 0))

    def topk(self, count: int) -> Detections:
        """The `count` (query, class) pairs with the highest scores in each image, or all if there are fewer."""
        classes = self.logits.shape[2]
        pairs = self.logits.sigmoid().flatten(1)
        scores, index = topk(pairs, count)
        query = (index // classes)[..., None].expand(-1, -1, 4)
        return Detections(scores, self.boxes.gather(1, query), index % classes)


def topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest values of the last dimension and their indices, or all if there are fewer.

    The size of that dimension may be symbolic (torch.export) or a tensor (torch.jit).
    """
    size = int(x.shape[-1]) if torch.jit.is_tracing() else x.shape[-1]
    return x.topk(torch.sym_min(count, size))


@dataclass
class Detections:
    """Detections of each image, highest score first: `scores` (B, n), `boxes` (B, n, 4), `classes` (B, n) int64."""

    scores: Tensor
    boxes: Tensor
    classes: Tensor


@dataclass
class Pairs:
    """M matched (query, object) pairs of a batch, as three index tensors (M,).

    image: index in the batch.
    query: index into the queries of that image.
    target: index into the objects of the whole batch, concatenated image by image.
    weight: (M,) factor of the class target and box losses of each pair; None: all 1.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    weight: Tensor | None = None

    def class_logits(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the target class of each pair into logits (B, Q, K); `labels` of all objects in the batch."""
        return self.image, self.query, labels[self.target]

    def weighted(self, x: Tensor | float) -> Tensor | float:
        """`x`, a number or one per pair (M,), times the weights."""
        return x if self.weight is None else x * self.weight


@dataclass
class DenoisingQueries(Queries):
    """T denoising queries per image and their known matches.

    group_size: queries per group, positives and negatives; groups are consecutive.
    groups: number of groups (T = groups * group_size, 0 without objects); 0 if denoising is off.
    pairs: each positive query with the object it was made from.
    """

    group_size: int
    groups: int
    pairs: Pairs

    def __len__(self) -> int:
        return self.content.shape[1]

    def concatenated_with(self, queries: Queries) -> Queries:
        """The denoising queries followed by the matching queries."""
        return Queries(
            torch.cat([self.content, queries.content], dim=1), torch.cat([self.anchors, queries.anchors], dim=1)
        )

    def attention_mask(self, num_queries: int) -> Tensor:
        """Self-attention mask of T denoising queries followed by `num_queries` matching queries.

        Matching queries never see denoising queries, groups never see each other; denoising queries see
        their own group and the matching queries (paper section 3.3, as in DN-DETR).

        Returns:
            (T + num_queries, T + num_queries) bool, True = blocked; rows attend to columns.
        """
        # The matching queries are one more group, which all queries may attend to.
        index = torch.arange(len(self) + num_queries, device=self.content.device)
        is_matching = index >= len(self)
        group = torch.where(is_matching, self.groups, index // max(self.group_size, 1))
        return (group[:, None] != group[None, :]) & ~is_matching[None, :]
