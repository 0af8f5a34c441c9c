"""Denoising, query selection and box refinement work in another package, as copies, where only torch is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dino_d2"
IDEAS = ("modeling/denoising.py", "modeling/query_selection.py", "modeling/box_refinement.py")
NEEDED = ("constants.py", "geometry.py", "structures.py")

USE = """
import sys

for absent in ("detectron2", "dino_d2", "fvcore", "torchvision", "scipy"):
    sys.modules[absent] = None

import torch
from torch import nn

from other.modeling.box_refinement import look_forward_twice
from other.modeling.denoising import ContrastiveDenoising
from other.modeling.query_selection import EncoderProposals, MixedQuerySelection
from other.structures import Memory, Targets

memory = Memory(torch.randn(2, 20, 8), None, ((4, 4), (2, 2)), torch.tensor([[[4.0, 4], [2, 2]]]).expand(2, -1, -1))
selection = MixedQuerySelection(5, 8, EncoderProposals(8, nn.Linear(8, 3), nn.Linear(8, 4)))(memory)
denoising = ContrastiveDenoising(3, 8, 6, 0.5, 1.0, False, 0)
targets = [Targets(torch.tensor([0, 2]), torch.rand(2, 4)), Targets(torch.tensor([1]), torch.rand(1, 4))]
made = denoising(targets)
queries = made.concatenated_with(selection.queries)
delta = torch.randn(queries.anchors.shape)
boxes = look_forward_twice(queries.anchors, queries.anchors, delta, delta).prediction
print(tuple(boxes.shape), tuple(made.attention_mask(5).shape))
"""


def test_copies_work_where_only_torch_is_installed(tmp_path: Path) -> None:
    for file in (*IDEAS, *NEEDED):
        copy = tmp_path / "other" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, copy)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # 3 groups of 2 positives and 2 negatives, and 5 matching queries.
    assert done.stdout == "(2, 17, 4) (17, 17)\n"
