import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dino_d2.constants import constant


def counted() -> tuple:
    calls = []

    @constant
    def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
        calls.append(size)
        return torch.zeros(size, dtype=dtype)

    return zeros, calls


def test_made_once_for_each_shape_and_dtype() -> None:
    zeros, calls = counted()
    assert zeros(2, torch.float32) is zeros(2, torch.float32)
    assert zeros(2, torch.float64).dtype == torch.float64
    assert zeros(3, torch.float32).shape == (3,)
    assert calls == [2, 2, 3]


def test_first_asked_for_in_inference_and_used_in_training() -> None:
    zeros, _ = counted()
    with torch.inference_mode():
        zeros(2, torch.float32)
    weight = torch.ones(2, requires_grad=True)
    (weight * zeros(2, torch.float32)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(2))


def test_recorded_graph_keeps_nothing() -> None:
    """Export runs it with tensors that have no numbers: kept, they would be found by the next real call."""
    zeros, calls = counted()

    class Add(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + zeros(x.shape[0], x.dtype)

    for strict in (False, True):
        torch.export.export(Add(), (torch.ones(4),), strict=strict)
    assert len(calls) >= 1
    before = len(calls)
    assert torch.equal(zeros(4, torch.float32), torch.zeros(4))
    assert len(calls) == before + 1


def test_tensors_of_a_dispatch_mode_stay_in_it() -> None:
    zeros, _ = counted()
    with FakeTensorMode():
        assert (torch.ones(2) + zeros(2, torch.float32)).shape == (2,)
    make_fx(lambda x: x + zeros(3, x.dtype))(torch.ones(3))
    for size in (2, 3):
        assert type(zeros(size, torch.float32)) is torch.Tensor
        with FakeTensorMode():
            assert (torch.ones(size) + zeros(size, torch.float32)).shape == (size,)
