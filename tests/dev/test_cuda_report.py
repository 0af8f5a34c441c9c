"""dev/cuda_report.py: the CUDA kernels compile, keep their registers, and need few instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dev.cuda_report import find_cuobjdump

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_compile_without_spills_to_an_eighth_of_the_instructions() -> None:
    command = [sys.executable, "dev/cuda_report.py", "--architectures", "90"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    _, *table = result.stdout.partition("| instructions |")
    counted = re.findall(r"\| (forward|backward) (.+) \| ([\d.]+) \|", "".join(table))
    design_of_2020 = {kind: float(count) for kind, name, count in counted if name == "of 2020"}
    ours = [(kind, float(count)) for kind, name, count in counted if name != "of 2020"]
    assert len(ours) == (10 if find_cuobjdump() else 0)
    for kind, count in ours:
        assert count <= design_of_2020[kind] / 8
