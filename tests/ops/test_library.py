"""Which cards the compiled op serves, and what is said where it does not."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dino_d2 import doctor
from dino_d2.ops import compiled, library, ms_deform_attn, require_compiled

DEFAULT = ["sm_80", "sm_90", "compute_90"]  # 8.0;9.0+PTX


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        (DEFAULT, (7, 5), False),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 6), True),  # RTX 30, by the machine code of 8.0
        (DEFAULT, (8, 9), True),  # RTX 40
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 0), True),  # by the portable code
        (DEFAULT, (12, 0), True),
        (["sm_90", "compute_90"], (8, 0), False),
        (["sm_90"], (10, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_86"], (8, 9), True),
        (["compute_70"], (8, 6), True),
        (["compute_80"], (7, 5), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a", "compute_90a"], (10, 0), False),
        (["sm_100f"], (10, 3), True),
        (["sm_100f", "compute_100f"], (12, 0), False),
        (["sm_120"], (12, 0), True),
        (["sm_103a"], (10, 0), False),
    ],
)
def test_code_runs_on_a_card_by_cudas_rules(code: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert library.has_code_for(code, capability) is runs


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """`machine(code, cards)`: a binary with that CUDA code on a machine with those cards."""

    def make(code: list[str], *cards: tuple[str, tuple[int, int]]) -> None:
        monkeypatch.setattr(library, "_available", {})
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, key: True)
        monkeypatch.setattr(library, "_code", lambda: code)
        monkeypatch.setattr(library, "_gpus", lambda: list(cards))
        library._warn_once.cache_clear()

    yield make
    library._warn_once.cache_clear()


def test_card_without_code_is_not_served_and_the_way_out_is_named(machine) -> None:
    machine(["sm_90", "compute_90"], ("NVIDIA A100", (8, 0)))
    assert not compiled("cuda")
    assert compiled("cpu")
    advice = (
        r"built for sm_90, compute_90, not for NVIDIA A100 \(compute capability 8\.0\)"
        r".*TORCH_CUDA_ARCH_LIST=8\.0 pip install"
    )
    with pytest.raises(ImportError, match=advice):
        require_compiled("cuda")
    with pytest.warns(UserWarning, match=advice):
        library.warn_about_fallback("cuda")


def test_every_card_must_be_served(machine) -> None:
    machine(["sm_80"], ("NVIDIA B200", (10, 0)), ("NVIDIA A100", (8, 0)), ("Tesla T4", (7, 5)))
    assert not compiled("cuda")
    with pytest.raises(ImportError, match=r"Tesla T4 \(compute capability 7\.5\).*_LIST='7\.5;8\.0;10\.0' pip install"):
        require_compiled("cuda")


def test_without_a_card_it_is_what_was_built(machine) -> None:
    machine(["sm_90"])
    assert compiled("cuda")


def test_card_with_code_is_served(machine) -> None:
    machine(DEFAULT, ("NVIDIA GeForce RTX 4090", (8, 9)))
    assert compiled("cuda")
    require_compiled("cuda")


@pytest.mark.parametrize("served", [True, False])
def test_first_call_may_be_one_that_is_traced(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked to find the answer, nothing of it is traced, and no graph breaks."""
    monkeypatch.setattr(library, "_available", {})
    if not served:
        monkeypatch.setattr(library, "_DISPATCH_KEYS", {})
    library._warn_once.cache_clear()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(value: torch.Tensor) -> torch.Tensor:
        return ms_deform_attn(value, [(2, 3)], None, torch.full((1, 6, 2, 1, 2, 2), 0.5), torch.ones(1, 6, 2, 1, 2))

    context = contextlib.nullcontext() if served else pytest.warns(UserWarning, match="plain PyTorch")
    with context:
        function(torch.randn(1, 6, 2, 8))
    assert compiled("cpu") == served
    library._warn_once.cache_clear()


def test_doctor_says_that_a_card_is_not_served(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(["sm_90"], ("NVIDIA A100", (8, 0)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["kernels for cuda"].ok is False
    assert "NVIDIA A100" in findings["kernels for cuda"].text


def test_binary_says_what_it_holds() -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("dino_d2::ms_deform_attn", "CUDA"):
        pytest.skip("built without CUDA")
    assert all(name.startswith(("sm_", "compute_")) for name in library._code())
