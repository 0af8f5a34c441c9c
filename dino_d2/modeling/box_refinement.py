"""Box refinement: how the box of decoder layer i becomes its prediction and the anchor of layer i + 1 (section 3.5).

To reuse this file in another DETR, see docs/lifting.md.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..geometry import inverse_sigmoid


class Refinement(NamedTuple):
    """Boxes (B, Q, 4) cx, cy, w, h in [0, 1].

    prediction: this layer's prediction.
    anchor: what the next layer attends around; detached.
    reference: the same boxes with gradient, which the next layer's prediction can start from.
    """

    prediction: Tensor
    anchor: Tensor
    reference: Tensor


def look_forward_twice(anchor: Tensor, reference: Tensor, delta: Tensor, normed_delta: Tensor) -> Refinement:
    """Predict from the reference, so that the loss also trains the previous layer (figure 6b).

    Args:
        anchor, reference: (B, Q, 4), from the previous layer.
        delta: (B, Q, 4), output of the box head for this layer, in logit space.
        normed_delta: the same for the normalised (LayerNorm) output.
    """
    refined = (delta + inverse_sigmoid(anchor)).sigmoid()
    return Refinement((normed_delta + inverse_sigmoid(reference)).sigmoid(), refined.detach(), refined)


def look_forward_once(anchor: Tensor, reference: Tensor, delta: Tensor, normed_delta: Tensor) -> Refinement:
    """Predict from the anchor, so that the loss trains only this layer (figure 6a; Deformable DETR)."""
    refined = (delta + inverse_sigmoid(anchor)).sigmoid().detach()
    return Refinement((normed_delta + inverse_sigmoid(anchor)).sigmoid(), refined, refined)


BOX_REFINEMENTS = {"twice": look_forward_twice, "once": look_forward_once}
