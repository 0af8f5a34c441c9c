"""Contrastive denoising: noised objects as extra queries whose answer is known (paper section 3.3).

Lifted into another DETR, this file needs nothing but `geometry` and `structures`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dino_d2.geometry import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from dino_d2.structures import DenoisingQueries, Pairs, Targets


def noise_labels(labels: Tensor, num_classes: int, ratio: float) -> Tensor:
    """Replace labels, with HALF of the probability `ratio`, by a class drawn at random (maybe the same one)."""
    replaced = torch.rand(labels.shape, device=labels.device) < ratio * 0.5
    return torch.where(replaced, torch.randint_like(labels, num_classes), labels)


def noise_boxes(boxes: Tensor, scale: float, least: Tensor, reorder: bool) -> Tensor:
    """Move both corners of each box, each coordinate by itself, and clamp the result to the image.

    A coordinate moves by `scale * u` half sides, u uniform in [least, least + 1), to either side. Below 1
    the box keeps overlapping its object; from 1 on it need not, and corners may change places: on either axis
    whenever they move towards each other, so 7 of 16 negatives (at scale 1) have a width or height below 0.

    Args:
        boxes: (..., 4) cx, cy, w, h in [0, 1].
        scale: lambda_1 of the paper.
        least: broadcasts to (..., 4); 0 for positives, 1 for negatives.
        reorder: put corners that changed places back in order; the official code leaves them.
    """
    half = boxes[..., 2:] / 2
    amount = torch.rand_like(boxes) + least
    side = torch.randint_like(boxes, 2) * 2 - 1
    corners = cxcywh_to_xyxy(boxes) + side * amount * scale * torch.cat([half, half], dim=-1)
    if reorder:
        corners = corners.unflatten(-1, (2, 2)).sort(dim=-2).values.flatten(-2)
    return xyxy_to_cxcywh(corners.clamp(0, 1))


class PlainDenoising(nn.Module):
    """Groups of noised objects to be restored (DN-DETR, arXiv 2203.01305).

    A group holds one slot per object of the fullest image, for each of its `parts`: positives, and with
    :class:`ContrastiveDenoising` negatives behind them. Slots that an image does not fill have zero content
    and the box (0.5, 0.5, 0.5, 0.5); their group sees them and the loss counts them as background.

    Args:
        num_classes: K. The embedding has one row more, never used, as released weights have it.
        embed_dim: C.
        number: about how many positives an image gets: max(1, number // most objects) groups.
        label_noise_ratio: see :func:`noise_labels`.
        box_noise_scale, reorder_negatives: see :func:`noise_boxes`.
        max_queries: bound on the denoising queries of an image (0: none). Above it there are fewer groups,
            then only a random choice of objects is denoised.
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
            raise ValueError("MODEL.DINO.DN.NUMBER must be at least 1; MODEL.DINO.DN.TYPE none switches denoising off")
        if 0 < max_queries < self.parts:
            raise ValueError(f"MODEL.DINO.DN.MAX_QUERIES must be 0 or at least {self.parts}, got {max_queries}")
        self.num_classes, self.number, self.max_queries = num_classes, number, max_queries
        self.label_noise_ratio, self.box_noise_scale = label_noise_ratio, box_noise_scale
        self.reorder_negatives = reorder_negatives
        self.label_embed = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, targets: Sequence[Targets], most_objects: int = 0) -> DenoisingQueries:
        """`most_objects`: of an image in other parts of the batch, which have as many groups and slots."""
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
        least = torch.arange(self.parts, device=device).view(-1, 1, 1)
        content = self.label_embed(noise_labels(labels, self.num_classes, self.label_noise_ratio))
        anchors = noise_boxes(boxes, self.box_noise_scale, least, self.reorder_negatives)
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
    """Each group also holds negatives: boxes moved by 1 to 2 half sides, to be called background."""

    parts = 2


class NoDenoising(nn.Module):
    """No denoising queries at all."""

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
    """Image, slot and batch-wide number (3, M) of every object that gets a slot; too many: a random choice of them."""
    objects = []
    first = 0
    for i, t in enumerate(targets):
        kept = torch.arange(len(t)) if len(t) <= slots else torch.randperm(len(t))[:slots]
        objects.append(torch.stack([torch.full_like(kept, i), torch.arange(len(kept)), first + kept]))
        first += len(t)
    return torch.cat(objects, dim=1)
