"""An exported file beside the model it was made of: do they find the same?

A score that differs by a rounding can put two tokens in another order; queries then start from each other's content.
So the model is asked twice: whether it would have chosen such tokens, and what it finds with those that the file chose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_d2.meta_arch import DINO
from dino_d2.ops import ms_deform_attn_fused

from .exportable import ExportableDINO

SHAPES = ((1, 180, 118), (5, 97, 205))  # batch, height, width: unlike what is traced
BEST = 100  # detections of an image that are compared

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class ExportError(ValueError):
    """This model cannot be exported, or its file would find something else."""


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from its model.

    score: of a detection.
    box: share of the longer side of the image.
    token: of the logit of a token, against that of the token which the model has in its place.
    share: of the best detections of an image, how many must be found.
    """

    score: float
    box: float
    token: float
    share: float


FULL = Tolerance(score=1e-4, box=1e-3, token=1e-3, share=1)
HALF = Tolerance(score=0.05, box=0.05, token=1.0, share=0.9)


@dataclass(frozen=True)
class Agreement:
    """How near a file is to its model in the worst of some images.

    share: of the best detections that are found again.
    score_error: largest difference of the scores of those.
    token_error: largest difference of the logits of the tokens chosen, rank by rank.
    """

    share: float
    score_error: float
    token_error: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.share >= tolerance.share and self.token_error <= tolerance.token


def check_agreement(model: DINO, run: Callable[..., Outputs], tolerance: Tolerance) -> str:
    """Compare a file with the model on images of other sizes and other numbers of them than were traced.

    Args:
        run: takes and returns what :class:`ExportableDINO` does.

    Returns:
        how they were compared, and how near they are.

    Raises:
        ExportError: they differ, or the file does not run.
    """
    found = [agreement(model, run, example_inputs(*shape, model.device), tolerance) for shape in SHAPES]
    shapes = " and ".join(f"{batch} of {height} x {width}" for batch, height, width in SHAPES)
    report = (
        f"compared with PyTorch ({shapes}): {min(x.share for x in found):.1%} of the best {BEST} detections are the "
        f"same, scores within {max(x.score_error for x in found):.1e}; the tokens that become queries score the same "
        f"within {max(x.token_error for x in found):.1e}"
    )
    if not all(x.within(tolerance) for x in found):
        raise ExportError(f"The exported file does not find what the model finds; {report}. It was not kept")
    return report


def agreement(
    model: DINO, run: Callable[..., Outputs], inputs: tuple[Tensor, Tensor, Tensor], tolerance: Tolerance
) -> Agreement:
    """How near a file is to the model in some images.

    Raises:
        ExportError: the file does not run.
    """
    try:
        *found, tokens = run(*inputs)
    except Exception as error:  # a runtime's own kinds have nothing else in common
        raise ExportError(
            "The exported file does not run on images of another size or number than were traced (backbone: "
            f"{type(model.backbone).__name__}): {error}. It was not kept"
        ) from error
    truth = ExportableDINO(model, ms_deform_attn_fused)
    told = None
    if tokens.shape[1]:  # else the queries are learned
        proposals = truth.model.query_selection.proposals
        proposals.class_head = told = _ToldTokens(proposals.class_head, tokens)
    with torch.no_grad():
        *expected, _ = truth(*inputs)
    share, score_error = _found_again(expected, found, tolerance)
    return Agreement(share, score_error, told.error if told else 0.0)


def example_inputs(batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Soft random images, of several every second one padded: arguments of :class:`ExportableDINO`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    sizes = torch.tensor([height, width]).repeat(batch, 1)
    if batch > 1:
        sizes[::2] = torch.tensor([height * 4 // 5, width * 3 // 4])
    return pixels.to(device, torch.uint8), sizes.to(device), (sizes * 2).to(device)


class _ToldTokens(nn.Module):
    """A class head of the proposals after which the best tokens are those told, in that order.

    Args:
        class_head: the model's.
        tokens: (B, Q).

    Attributes:
        error: largest difference between the logits of the tokens told and of those that are best without.
    """

    def __init__(self, class_head: nn.Module, tokens: Tensor):
        super().__init__()
        self.class_head = class_head
        self.tokens = tokens
        self.error = torch.inf

    def forward(self, features: Tensor) -> Tensor:
        scores = self.class_head(features).max(-1, keepdim=True).values
        told = scores[..., 0].gather(1, self.tokens)
        best = scores[..., 0].topk(self.tokens.shape[1]).values
        self.error = (told - best).abs().max().item()
        ranks = torch.arange(self.tokens.shape[1], 0, -1, dtype=scores.dtype, device=scores.device)
        return torch.zeros_like(scores).scatter(1, self.tokens[..., None], ranks[:, None].expand_as(told[..., None]))


def _found_again(expected: list[Tensor], found: list[Tensor], tolerance: Tolerance) -> tuple[float, float]:
    """How many of the best detections are found again, and how far apart their scores are at most.

    Found again: the same class, a score and a box within the tolerance. Order is that of the scores, so that it says
    nothing where two are as good as equal.

    Args:
        expected, found: boxes, scores and classes.

    Returns:
        a share in [0, 1], that of the worst image, and the largest difference of the scores of those.
    """
    same, largest = [], 0.0
    for (boxes, scores, classes), (other_boxes, other_scores, other_classes) in zip(
        zip(*expected, strict=True), zip(*found, strict=True), strict=True
    ):
        boxes, scores, classes = boxes[:BEST], scores[:BEST], classes[:BEST]
        box_error = (boxes[:, None] - other_boxes[None]).abs().amax(-1) / boxes.max().clamp(min=1)
        score_error = (scores[:, None] - other_scores[None]).abs()
        candidate = (classes[:, None] == other_classes[None]) & (box_error <= tolerance.box)
        candidate &= (score_error <= tolerance.score) & ((scores > 0)[:, None] == (other_scores > 0)[None])
        error = score_error.masked_fill(~candidate, torch.inf).amin(-1)
        there = error.isfinite()
        same.append(there.float().mean().item())
        largest = max(largest, error[there].max().item() if there.any() else 0.0)
    return min(same), largest
