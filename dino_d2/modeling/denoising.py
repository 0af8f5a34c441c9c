"""Contrastive denoising: noised objects as extra queries with known targets (paper section 3.3).

To reuse this file in another DETR, see docs/lifting.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..geometry import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from ..structures import DenoisingQueries, Pairs, Targets


def noise_labels(labels: Tensor, num_classes: int, ratio: float) -> Tensor:
    """Replace labels by random classes (possibly the same) with HALF the probability `ratio`."""
    replaced = torch.rand(labels.shape, device=labels.device) < ratio * 0.5
    return torch.where(replaced, torch.randint_like(labels, num_classes), labels)


def noise_boxes(boxes: Tensor, scale: float, minimum: Tensor, reorder: bool) -> Tensor:
    """Move both corners of each box, each coordinate independently, and clamp them to the image.

    A coordinate moves by `scale * u` half sides in either direction, u uniform in [minimum, minimum + 1). Below 1 the
    box still overlaps its object; from 1 on it may not, and corners can swap: on either axis whenever they move
    towards each other, so 7 of 16 negatives (at scale 1) have a negative width or height.

    Args:
        boxes: (..., 4) cx, cy, w, h in [0, 1].
        scale: lambda_1 in the paper.
        minimum: broadcasts to (..., 4); 0 for positives, 1 for negatives.
        reorder: swap corners back; the official code does not.
    """
    half = boxes[..., 2:] / 2
    amount = torch.rand_like(boxes) + minimum
    side = torch.randint_like(boxes, 2) * 2 - 1
    corners = cxcywh_to_xyxy(boxes) + side * amount * scale * torch.cat([half, half], dim=-1)
    if reorder:
        corners = corners.unflatten(-1, (2, 2)).sort(dim=-2).values.flatten(-2)
    return xyxy_to_cxcywh(corners.clamp(0, 1))


class PlainDenoising(nn.Module):
    """Groups of noised objects to be denoised (DN-DETR, arXiv 2203.01305).

    A group has one slot per object of the image with the most objects, for each of its `parts`: positives, and with
    :class:`ContrastiveDenoising` negatives after them. Unused slots have zero content and the box (0.5, 0.5, 0.5, 0.5);
    they are visible to their group and count as background in the loss.

    Args:
        num_classes: K. The embedding has one more row, unused, for compatibility with released weights.
        embed_dim: C.
        number: approximate number of positives per image: max(1, number // most objects) groups.
        label_noise_ratio: see :func:`noise_labels`.
        box_noise_scale, reorder_negatives: see :func:`noise_boxes`.
        max_queries: limit on denoising queries per image (0: no limit). To meet it the number of groups is reduced
            first; then only a random subset of objects is denoised.
    """

    parts = 1

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        number: int,
        label_noise_ratio: float,
        box_noise_scale: float,
        reorder_negatives: bool,
        max_queries: int,
    ):
        super().__init__()
        if number < 1:
            raise ValueError("MODEL.DINO.DN.NUMBER must be at least 1; MODEL.DINO.DN.TYPE none disables denoising")
        if 0 < max_queries < self.parts:
            raise ValueError(f"MODEL.DINO.DN.MAX_QUERIES must be 0 or at least {self.parts}, got {max_queries}")
        self.num_classes, self.number, self.max_queries = num_classes, number, max_queries
        self.label_noise_ratio, self.box_noise_scale = label_noise_ratio, box_noise_scale
        self.reorder_negatives = reorder_negatives
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, targets: Sequence[Targets], most_objects: int = 0) -> DenoisingQueries:
        """Make denoising queries. `most_objects`: maximum per image over all parts of an accumulated batch."""
        device = self.label_embed.weight.device
        most = max([most_objects, *(len(t) for t in targets)])
        slots = min(most, self.max_queries // self.parts) if self.max_queries else most
        groups = max(1, self.number // max(most, 1))
        if self.max_queries and slots:
            groups = min(groups, self.max_queries // (slots * self.parts))
        group_size = slots * self.parts

        image, slot, target = _objects(targets, slots).to(device, non_blocking=True).unbind()
        labels = torch.cat([t.labels for t in targets])[target].expand(groups, self.parts, -1)
        boxes = torch.cat([t.boxes for t in targets])[target].expand(groups, self.parts, -1, -1)
        # Part p of a group moves its boxes by p to p + 1 half sides.
        minimum = torch.arange(self.parts, device=device).view(-1, 1, 1)
        content = self.label_embed(noise_labels(labels, self.num_classes, self.label_noise_ratio))
        anchors = noise_boxes(boxes, self.box_noise_scale, minimum, self.reorder_negatives)
        anchors = inverse_sigmoid(anchors).sigmoid()

        group = torch.arange(groups, device=device).view(-1, 1, 1)
        part = torch.arange(self.parts, device=device).view(-1, 1)
        query = group * group_size + part * slots + slot  # (groups, parts, objects)
        image, target = image.expand_as(query), target.expand_as(query)
        shape = (len(targets), groups * group_size)
        return DenoisingQueries(
            content=content.new_zeros(*shape, content.shape[-1]).index_put((image, query), content),
            anchors=anchors.new_full((*shape, 4), 0.5).index_put((image, query), anchors),
            group_size=group_size,
            groups=groups,
            pairs=Pairs(image[:, 0].flatten(), query[:, 0].flatten(), target[:, 0].flatten()),
        )


class ContrastiveDenoising(PlainDenoising):
    """Groups also have negatives: boxes moved by 1 to 2 half sides, with background as target."""

    parts = 2


class NoDenoising(nn.Module):
    """Makes no denoising queries."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, targets: Sequence[Targets], most_objects: int = 0) -> DenoisingQueries:
        boxes = targets[0].boxes
        none = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return DenoisingQueries(
            content=boxes.new_zeros(len(targets), 0, self.embed_dim),
            anchors=boxes.new_zeros(len(targets), 0, 4),
            group_size=0,
            groups=0,
            pairs=Pairs(none, none, none),
        )


def _objects(targets: Sequence[Targets], slots: int) -> Tensor:
    """Image, slot and batch-wide index (3, M) of each object; a random subset where there are too few slots."""
    objects = []
    first = 0
    for i, t in enumerate(targets):
        index = torch.arange(len(t)) if len(t) <= slots else torch.randperm(len(t))[:slots]
        objects.append(torch.stack([torch.full_like(index, i), torch.arange(len(index)), first + index]))
        first += len(t)
    return torch.cat(objects, dim=1)
