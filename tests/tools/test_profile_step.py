"""tools/profile_step.py on a small picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_reports_time_and_operators() -> None:
    command = ["tools/profile_step.py", "--config-file", "configs/dino_r50_4scale_12ep.yaml", "--size", "64", "96"]
    command += ["--steps", "1", "--objects", "2", "MODEL.DINO.ENC_LAYERS", "1", "MODEL.DINO.DEC_LAYERS", "1"]
    command += ["MODEL.DINO.NUM_QUERIES", "20"]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "1 x 64 x 96, 2 objects each, cpu" in result.stdout
    assert "dino_d2::ms_deform_attn_fused_backward" in result.stdout
