"""How decoder layer i's box becomes a prediction and the anchor of layer i + 1 (paper section 3.5).

Lifted into another DETR, this file needs nothing but `geometry`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dino_d2.geometry import inverse_sigmoid


class Refinement(NamedTuple):
    """Boxes (B, Q, 4) cx, cy, w, h in [0, 1].

    prediction: of this layer.
    anchor: what the next layer attends around; carries no gradient.
    reference: the same boxes with their gradient, which the next layer's prediction may start from.
    """

    prediction: Tensor
    anchor: Tensor
    reference: Tensor


def look_forward_twice(anchor: Tensor, reference: Tensor, delta: Tensor, normed_delta: Tensor) -> Refinement:
    """The prediction starts from the reference: its loss also reaches the layer before (figure 6b).

    Args:
        anchor, reference: (B, Q, 4), from the layer before.
        delta: (B, Q, 4), what the box head says of this layer's output, in logit space.
        normed_delta: the same of the LayerNormed output.
    """
    refined = (delta + inverse_sigmoid(anchor)).sigmoid()
    return Refinement((normed_delta + inverse_sigmoid(reference)).sigmoid(), refined.detach(), refined)


def look_forward_once(anchor: Tensor, reference: Tensor, delta: Tensor, normed_delta: Tensor) -> Refinement:
    """The prediction starts from the anchor: its loss stays in this layer (figure 6a; Deformable DETR)."""
    refined = (delta + inverse_sigmoid(anchor)).sigmoid().detach()
    return Refinement((normed_delta + inverse_sigmoid(anchor)).sigmoid(), refined, refined)


BOX_REFINEMENTS = {"twice": look_forward_twice, "once": look_forward_once}
