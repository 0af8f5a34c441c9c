import pytest
import torch
from torch import Tensor

from dino_d2.geometry import inverse_sigmoid
from dino_d2.modeling.box_refinement import BOX_REFINEMENTS, look_forward_once, look_forward_twice

both = pytest.mark.parametrize("refine", BOX_REFINEMENTS.values(), ids=BOX_REFINEMENTS.keys())


def boxes() -> Tensor:
    return (torch.rand(2, 3, 4, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()


def delta() -> Tensor:
    return torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)


def reaches(output: Tensor, source: Tensor) -> bool:
    """Whether a gradient flows from `output` to `source`."""
    if not output.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(output.sum(), source, allow_unused=True, retain_graph=True)
    return gradient is not None and bool(gradient.any())


@both
def test_values_move_boxes_in_logit_space(refine) -> None:
    start, plain, normed = boxes(), delta(), delta()
    prediction, anchor, reference = refine(start, start, plain, normed)
    torch.testing.assert_close(prediction, (normed + inverse_sigmoid(start)).sigmoid())
    torch.testing.assert_close(anchor, (plain + inverse_sigmoid(start)).sigmoid())
    torch.testing.assert_close(reference, anchor)


@both
def test_anchor_never_carries_a_gradient(refine) -> None:
    assert not refine(boxes(), boxes(), delta(), delta()).anchor.requires_grad


@both
def test_prediction_is_made_of_the_normed_output_alone(refine) -> None:
    plain, normed = delta(), delta()
    prediction = refine(boxes(), boxes(), plain, normed).prediction
    assert reaches(prediction, normed)
    assert not reaches(prediction, plain)


def test_twice_starts_the_prediction_from_the_reference() -> None:
    anchor, reference, normed = boxes(), boxes(), delta()
    prediction = look_forward_twice(anchor, reference, delta(), normed).prediction
    torch.testing.assert_close(prediction, (normed + inverse_sigmoid(reference)).sigmoid())
    assert reaches(prediction, reference)
    assert not reaches(prediction, anchor)


def test_once_starts_the_prediction_from_the_anchor() -> None:
    anchor, reference, normed = boxes(), boxes(), delta()
    prediction = look_forward_once(anchor, reference, delta(), normed).prediction
    torch.testing.assert_close(prediction, (normed + inverse_sigmoid(anchor)).sigmoid())
    assert not reaches(prediction, reference)


@pytest.mark.parametrize(("refine", "reached"), [(look_forward_twice, [False, True, True]),
                                                 (look_forward_once, [False, False, True])])  # fmt: skip
def test_loss_of_a_layer_reaches_back_one_layer_with_twice_and_none_with_once(refine, reached: list[bool]) -> None:
    anchor = reference = boxes().detach()
    deltas = [delta() for _ in range(3)]
    for layer_delta in deltas:
        prediction, anchor, reference = refine(anchor, reference, layer_delta, layer_delta)
    assert [reaches(prediction, layer_delta) for layer_delta in deltas] == reached


@both
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_boxes_at_the_edge_stay_finite_and_movable(refine, edge: float) -> None:
    start = torch.full((1, 1, 4), edge, dtype=torch.float64)
    towards_middle = torch.full((1, 1, 4), 2 - 4 * edge, dtype=torch.float64, requires_grad=True)
    refinement = refine(start, start, towards_middle, towards_middle)
    assert reaches(refinement.prediction, towards_middle)
    assert ((refinement.anchor - edge).abs() > 1e-3).all()
