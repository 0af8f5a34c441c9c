"""`python -m dino_d2.doctor`: report installed packages and available kernels, and test the kernels.

The exit code is 0 if the compiled op was loaded, has kernels for every device found, and its results and gradients
match the float64 reference.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dino_d2 import ops

PACKAGES = (
    "torch", "torchvision", "detectron2", "fvcore", "iopath", "pycocotools", "hotcoco", "scipy", "timm", "numpy",
)  # fmt: skip
NOT_INSTALLED = "not installed"
SHAPES = [(13, 17), (7, 9), (4, 5), (2, 3)]
# Largest error relative to the largest value: a few rounding errors of the dtype.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@dataclass(frozen=True)
class Finding:
    """A line of the report. ok: None for information."""

    name: str
    text: str
    ok: bool | None = None


def examine() -> Iterator[Finding]:
    """Yield what is installed, then test results, one by one."""
    yield Finding("python", f"{platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        version = _version(package)
        if package == "detectron2" and version == NOT_INSTALLED:
            yield Finding(package, "not installed: dino-d2 install-detectron2", ok=False)
        else:
            yield Finding(package, version)
    for program in ("c++", "nvcc"):
        yield Finding(program, _first_line_of_version(program))
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator())
    else:
        yield Finding("accelerator", "none usable by torch")
    for device in devices:
        try:
            ops.require_compiled(device.type)
        except ImportError as error:
            yield Finding(f"kernels for {device.type}", str(error), ok=False)
            continue
        yield Finding(f"kernels for {device.type}", _kernels(device), ok=True)
        for dtype in TOLERANCES:
            yield _compare(device, dtype)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:  # some installations of detectron2 have no metadata under its name
        return getattr(importlib.import_module(package), "__version__", "installed")
    except ImportError:
        return NOT_INSTALLED


def _first_line_of_version(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        return "not found"
    result = subprocess.run([path, "--version"], capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    if not lines:
        return path
    return lines[-1] if program == "nvcc" else lines[0]


def _kernels(device: torch.device) -> str:
    if device.type == "cpu":
        held = torch.ops.dino_d2.cpu_kernels_held()
        return f"{held}; this processor uses {torch.ops.dino_d2.cpu_kernels()}, {torch.get_num_threads()} threads"
    name = torch.get_device_module(device).get_device_name(device)
    return f"for {torch.ops.dino_d2.accelerator_architectures()}; this one is {name}"


def _compare(device: torch.device, dtype: torch.dtype) -> Finding:
    """Compare forward and backward of the fused and the plain op with the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in SHAPES)
    sampling = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (2, tokens, 4, len(SHAPES), 4)
    value = torch.randn(2, tokens, 4, 32, generator=generator).to(device, dtype)
    offsets = torch.randn(*sizes, 2, generator=generator).to(device, sampling)
    logits = torch.randn(sizes, generator=generator).to(device, sampling)
    # A quarter of a pixel away from the kinks of bilinear interpolation, so that rounding cannot cross one.
    reference = torch.full((2, tokens, len(SHAPES), 2), 0.5, device=device, dtype=sampling)
    offsets = (offsets * 2).round() / 2 + 0.25

    def plain(value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        locations = ops.sampling_locations_of(reference, offsets, SHAPES)
        return ops.ms_deform_attn(value, SHAPES, None, locations, ops.attention_weights_of(logits))

    def fused(value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return ops.ms_deform_attn_fused(value, SHAPES, reference, offsets, logits)

    def truth(value: torch.Tensor, offsets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return ops.ms_deform_attn_fused_reference(value, SHAPES, reference.double(), offsets, logits)

    def results(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]

    exact = results(truth, *(x.double() for x in (value, offsets, logits)))
    worst = 0.0
    for function in (plain, fused):
        for ours, right in zip(results(function, value, offsets, logits), exact, strict=True):
            worst = max(worst, ((ours.double() - right).abs().max() / right.abs().max()).item())
    name = f"{str(dtype).removeprefix('torch.')} on {device.type}"
    text = f"largest error {worst:.0e}, tolerance {TOLERANCES[dtype]:.0e}"
    return Finding(name, text, ok=worst <= TOLERANCES[dtype])


def main() -> int:
    healthy = True
    for finding in examine():
        mark = {None: "    ", True: "ok  ", False: "BAD "}[finding.ok]
        print(f"{mark}{finding.name:<22} {finding.text}", flush=True)
        healthy &= finding.ok is not False
    print("\nall checks passed" if healthy else "\nsome checks failed: see the lines marked BAD")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
