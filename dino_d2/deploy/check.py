"""Check that an exported file and its model give the same detections.

A rounding difference in scores can swap two tokens, so that their queries get each other's content. So there are two
checks: the tokens selected by the file must score as the model's own, and the model, forced to use these tokens, must
give the same detections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_d2.meta_arch import DINO
from dino_d2.ops import ms_deform_attn_fused

from .exportable import ExportableDINO

SHAPES = ((1, 180, 118), (5, 97, 205))  # batch, height, width: different from those traced
TOP = 100  # detections compared per image

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class ExportError(ValueError):
    """The model cannot be exported, or the exported file gives different results."""


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences between a file and its model.

    score: of a detection.
    box: fraction of the longer side of the image.
    token: logit of a selected token, compared with the model's token of the same rank.
    share: fraction of the highest-scoring detections of an image that must match.
    """

    score: float
    box: float
    token: float
    share: float


FULL = Tolerance(score=1e-4, box=1e-3, token=1e-3, share=1)
ROUNDED = Tolerance(score=0.05, box=0.05, token=0.3, share=0.9)  # to 16 or 8 bits


@dataclass(frozen=True)
class Agreement:
    """Agreement between a file and its model, for the worst of several images.

    share: fraction of the highest-scoring detections that match.
    score_error: largest score difference of those.
    token_error: largest logit difference of selected tokens, rank by rank.
    """

    share: float
    score_error: float
    token_error: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.share >= tolerance.share and self.token_error <= tolerance.token


def check_agreement(model: DINO, run: Callable[..., Outputs], tolerance: Tolerance) -> str:
    """Compare a file with the model on image and batch sizes other than those traced.

    Args:
        run: same arguments and results as :class:`ExportableDINO`.

    Returns:
        a report on the comparison.

    Raises:
        ExportError: they differ, or the file does not run.
    """
    found = [agreement(model, run, example_inputs(*shape, model.device), tolerance) for shape in SHAPES]
    shapes = " and ".join(f"{batch} of {height} x {width}" for batch, height, width in SHAPES)
    report = (
        f"compared with PyTorch ({shapes}): {min(x.share for x in found):.1%} of the top {TOP} detections match, "
        f"scores within {max(x.score_error for x in found):.1e}, logits of selected tokens within "
        f"{max(x.token_error for x in found):.1e}"
    )
    if not all(x.within(tolerance) for x in found):
        raise ExportError(f"The exported file and the model give different detections; {report}. The file was deleted")
    return report


def agreement(
    model: DINO, run: Callable[..., Outputs], inputs: tuple[Tensor, Tensor, Tensor], tolerance: Tolerance
) -> Agreement:
    """Compare a file with the model on some images.

    Raises:
        ExportError: the file does not run.
    """
    try:
        *found, tokens = run(*inputs)
    except Exception as error:  # runtimes have their own exception types
        raise ExportError(
            "The exported file does not run with image or batch sizes other than those traced (backbone: "
            f"{type(model.backbone).__name__}): {error}. The file was deleted"
        ) from error
    truth = ExportableDINO(model, ms_deform_attn_fused)
    forced = None
    if tokens.shape[1]:  # else the queries are learned
        proposals = truth.model.query_selection.proposals
        proposals.class_head = forced = _ForcedTokens(proposals.class_head, tokens)
    with torch.no_grad():
        *expected, _ = truth(*inputs)
    share, score_error = _matching(expected, found, tolerance)
    return Agreement(share, score_error, forced.error if forced else 0.0)


def example_inputs(batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth random images, every second one padded in batches: arguments of :class:`ExportableDINO`."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)
    sizes = torch.tensor([height, width]).repeat(batch, 1)
    if batch > 1:
        sizes[::2] = torch.tensor([height * 4 // 5, width * 3 // 4])
    return pixels.to(device, torch.uint8), sizes.to(device), (sizes * 2).to(device)


class _ForcedTokens(nn.Module):
    """Replaces the proposals' class head so that the given tokens are selected, in that order.

    Args:
        class_head: the model's.
        tokens: (B, Q), indices.

    Attributes:
        error: largest difference between the logits of the given tokens and of the model's own selection.
    """

    def __init__(self, class_head: nn.Module, tokens: Tensor):
        super().__init__()
        self.class_head = class_head
        self.tokens = tokens
        self.error = torch.inf

    def forward(self, features: Tensor) -> Tensor:
        scores = self.class_head(features).max(-1, keepdim=True).values
        forced = scores[..., 0].gather(1, self.tokens)
        best = scores[..., 0].topk(self.tokens.shape[1]).values
        self.error = (forced - best).abs().max().item()
        ranks = torch.arange(self.tokens.shape[1], 0, -1, dtype=scores.dtype, device=scores.device)
        return torch.zeros_like(scores).scatter(1, self.tokens[..., None], ranks[:, None].expand_as(forced[..., None]))


def _matching(expected: list[Tensor], found: list[Tensor], tolerance: Tolerance) -> tuple[float, float]:
    """Match the highest-scoring detections: same class, score and box within the tolerance.

    Order is ignored, because it is arbitrary for nearly equal scores.

    Args:
        expected, found: boxes, scores and classes.

    Returns:
        the fraction that matches in [0, 1], for the worst image, and the largest score difference of matches.
    """
    same, largest = [], 0.0
    for (boxes, scores, classes), (other_boxes, other_scores, other_classes) in zip(
        zip(*expected, strict=True), zip(*found, strict=True), strict=True
    ):
        boxes, scores, classes = boxes[:TOP], scores[:TOP], classes[:TOP]
        box_error = (boxes[:, None] - other_boxes[None]).abs().amax(-1) / boxes.max().clamp(min=1)
        score_error = (scores[:, None] - other_scores[None]).abs()
        candidate = (classes[:, None] == other_classes[None]) & (box_error <= tolerance.box)
        candidate &= (score_error <= tolerance.score) & ((scores > 0)[:, None] == (other_scores > 0)[None])
        error = score_error.masked_fill(~candidate, torch.inf).amin(-1)
        matched = error.isfinite()
        same.append(matched.double().mean().item())
        largest = max(largest, error[matched].max().item() if matched.any() else 0.0)
    return min(same), largest
