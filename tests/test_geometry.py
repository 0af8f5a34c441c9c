import pytest
import torch
from torchvision.ops import generalized_box_iou

from dino_d2.geometry import LOGIT_EPS, cxcywh_to_xyxy, generalized_iou, inverse_sigmoid, xyxy_to_cxcywh


def random_boxes(count: int) -> torch.Tensor:
    """cx, cy, w, h well inside [0, 1]."""
    return torch.rand(count, 4, dtype=torch.float64) * 0.3 + 0.2


def test_corners_of_a_box() -> None:
    box = torch.tensor([0.5, 0.4, 0.2, 0.6])
    torch.testing.assert_close(cxcywh_to_xyxy(box), torch.tensor([0.4, 0.1, 0.6, 0.7]))


def test_box_formats_are_inverse_to_each_other() -> None:
    boxes = random_boxes(24).view(2, 3, 4, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_inverse_sigmoid_is_the_logit_between_the_tails() -> None:
    x = torch.linspace(2 * LOGIT_EPS, 1 - 2 * LOGIT_EPS, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x), torch.logit(x))


@pytest.mark.parametrize("x", [-1.0, 0.0, 1.0, 2.0])
def test_inverse_sigmoid_is_bounded(x: float) -> None:
    bound = torch.logit(torch.tensor(LOGIT_EPS)).abs()
    assert inverse_sigmoid(torch.tensor(x)).abs() <= bound + 1e-2
    assert inverse_sigmoid(torch.tensor(x)).sign() == (1 if x > 0.5 else -1)


def test_inverse_sigmoid_has_a_finite_gradient_everywhere() -> None:
    x = torch.tensor([0.0, 1e-9, 0.5, 1.0], requires_grad=True)
    inverse_sigmoid(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], 1.0),
        ([0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], 1 / 7 - 2 / 9),
        ([0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0], 0 - 1 / 3),
        ([0.0, 0.0, 4.0, 1.0], [1.0, 0.0, 2.0, 1.0], 1 / 4),
    ],
    ids=["same", "overlapping", "apart", "inside"],
)
def test_generalized_iou_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert generalized_iou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-5)


def test_generalized_iou_is_torchvisions_for_all_pairs() -> None:
    a, b = cxcywh_to_xyxy(random_boxes(5)), cxcywh_to_xyxy(random_boxes(7))
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b), rtol=0, atol=1e-4)


@pytest.mark.parametrize("b", [[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]], ids=["point", "image"])
@pytest.mark.parametrize("a", [[0.5, 0.5, 0.5, 0.5], [0.6, 0.6, 0.4, 0.4]], ids=["point", "upside down"])
def test_generalized_iou_of_degenerate_boxes_is_finite(a: list[float], b: list[float]) -> None:
    box = torch.tensor(a, requires_grad=True)
    iou = generalized_iou(box, torch.tensor(b))
    iou.backward()
    assert iou.isfinite()
    assert box.grad.isfinite().all()
