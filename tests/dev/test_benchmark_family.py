from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_has_its_milliseconds_and_its_ratio_to_the_first() -> None:
    small = ["MODEL.DINO.NUM_QUERIES", "20", "MODEL.DINO.DIM_FEEDFORWARD", "16", "MODEL.DINO.DN.NUMBER", "4"]
    command = [sys.executable, "dev/benchmark_family.py", "--rounds", "1", "--height", "64", "--width", "64", *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    cases = [cells for cells in rows if cells[0] in ("DINO, focal loss", "stable_dino", "align_dino")]
    assert [len(cells) for cells in cases] == [5, 5, 5, 3, 3]
    assert [cells[2] for cells in cases if cells[0].startswith("DINO")] == ["1.00", "1.00"]
    assert all(float(number) > 0 for cells in cases for number in cells[1:])
