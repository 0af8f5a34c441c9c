"""The CPU kernels on 64-bit Arm, whose NEON has the vectors of 16 bytes that the set for any processor is made of.

Cross-compiled, and run by an emulator: what they compute, not how fast.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_d2.ops import attention_weights_of, ms_deform_attn_reference, sampling_locations_of

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = Path(__file__).parent
MAIN = HERE / "cpu_on_arm" / "main.cpp"
KERNELS = HERE.parent.parent / "ops" / "csrc" / "cpu" / "kernels_generic.cpp"
SHAPES = [(9, 11), (5, 6), (2, 3)]
TOKENS = sum(height * width for height, width in SHAPES)
BATCH, QUERIES, HEADS, POINTS = 2, 13, 2, 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}  # of the largest number; of the output

needs_emulator = pytest.mark.skipif(
    shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None, reason=f"needs {COMPILER} and {EMULATOR}"
)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_program_fits_the_kernels() -> None:
    """Says so on machines without a compiler for Arm, too."""
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", str(MAIN)], check=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("arm") / "kernels"
    sources = [str(MAIN), str(KERNELS)]
    options = ["-O2", "-std=c++17", "-static", "-fno-math-errno", "-fno-trapping-math"]
    subprocess.run([COMPILER, *options, *sources, "-o", str(binary)], check=True)
    return binary


def bytes_of(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@needs_emulator
@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
@pytest.mark.parametrize("reference_size", [0, 2, 4], ids=["plain", "points", "boxes"])
@pytest.mark.parametrize("channels", [4, 8, 16, 32, 20])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda x: str(x).removeprefix("torch."))
def test_agrees_with_float64(
    program: Path, tmp_path: Path, dtype: torch.dtype, channels: int, reference_size: int, staged: bool
) -> None:
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (BATCH, QUERIES, HEADS, len(SHAPES), POINTS)
    value = torch.randn(BATCH, TOKENS, HEADS, channels).to(dtype)
    grad_output = torch.randn(BATCH, QUERIES, HEADS * channels).to(dtype)
    positions = (torch.randn(*sizes, 2) if reference_size else torch.rand(*sizes, 2) * 1.4 - 0.2).to(accumulate)
    weights = (torch.randn(sizes) if reference_size else torch.rand(sizes)).to(accumulate)
    reference = torch.rand(BATCH, QUERIES, len(SHAPES), reference_size).to(accumulate)

    leaves = [x.double().requires_grad_() for x in (value, positions, weights)]
    locations, shares = leaves[1:]
    if reference_size:
        locations = sampling_locations_of(reference.double(), locations, SHAPES)
        shares = attention_weights_of(shares)
    expected = ms_deform_attn_reference(leaves[0], SHAPES, locations, shares)
    truths = [expected.detach(), *torch.autograd.grad(expected, leaves, grad_output.double())]

    numbers = (dtype.itemsize, BATCH, TOKENS, HEADS, channels, QUERIES, len(SHAPES), POINTS, reference_size, staged)
    header = struct.pack(f"{len(numbers)}q", *numbers) + bytes_of(torch.tensor(SHAPES))
    arrays = b"".join(map(bytes_of, (value, positions, weights, reference, grad_output)))
    (tmp_path / "in").write_bytes(header + arrays)
    subprocess.run([EMULATOR, str(program), str(tmp_path / "in"), str(tmp_path / "out")], check=True)

    written = bytearray((tmp_path / "out").read_bytes())
    for i, truth in enumerate(truths):
        stored = dtype if i == 0 else accumulate
        count = truth.numel() * stored.itemsize
        result, written = torch.frombuffer(written[:count], dtype=stored), written[count:]
        tolerance = TOLERANCE[dtype if i == 0 else accumulate]
        assert (result.double() - truth.flatten()).abs().max() <= tolerance * truth.abs().max()
    assert not written
