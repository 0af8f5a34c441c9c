"""What OnnxPredictor does before and after the session, and that it needs no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from dino_d2.deploy.onnx_predictor import OnnxPredictor, resize, shortest_edge_size

WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "detectron2", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from dino_d2.deploy import OnnxPredictor
assert "torch" not in sys.modules
import dino_d2
try:
    dino_d2.load_config
except ImportError as error:
    assert "needs detectron2: dino-d2 install-detectron2" in str(error)
else:
    raise AssertionError("load_config without torch")
assert not hasattr(dino_d2, "nonsense")
"""

# With nothing but the copies, Python, onnxruntime, NumPy and Pillow.
COPIED = """
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path[:] = [str(Path.cwd()), *(path for path in sys.path[1:] if "site-packages" not in path)]
from dino_d2.deploy import OnnxPredictor

found = OnnxPredictor(sys.argv[1])(np.full((90, 120, 3), 128, np.uint8))
assert found.draw().size == (120, 90)
modules = {name: module for name, module in sys.modules.items() if name.startswith("dino_d2.")}
assert all(Path(module.__file__).is_relative_to(Path.cwd()) for module in modules.values()), modules
print(len(found))
"""
ROOT = Path(__file__).parents[2]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "new_height", "new_width"),
    [(48, 64, 80, 107), (107, 160, 67, 100), (60, 90, 60, 45), (7, 9, 300, 386), (300, 386, 7, 9), (50, 40, 50, 40),
     (33, 1, 66, 2), (100, 90, 31, 28), (480, 640, 203, 271), (45, 200, 1, 4)],
)  # fmt: skip
def test_resizing_is_that_of_pillow(height: int, width: int, new_height: int, new_width: int) -> None:
    image = picture(height, width)
    expected = Image.fromarray(image).resize((new_width, new_height), Image.BILINEAR)
    assert np.array_equal(resize(image, new_height, new_width), np.asarray(expected))


def test_high_pictures_differ_from_pillow_by_no_more_than_a_rounding() -> None:
    image = picture(400, 100)
    expected = np.asarray(Image.fromarray(image).resize((33, 132), Image.BILINEAR)).astype(int)
    assert np.abs(resize(image, 132, 33) - expected).max() <= 1


def test_sizes_are_those_of_detectron2() -> None:
    for height, width, least, most in np.random.default_rng(0).integers(1, 2000, (2000, 4)).tolist():
        expected = ResizeShortestEdge.get_output_shape(height, width, least, most)
        assert shortest_edge_size(height, width, least, most) == tuple(max(side, 1) for side in expected)


def test_torch_is_not_needed() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_files_that_the_documentation_names_work_by_themselves(onnx_file: Path, tmp_path: Path) -> None:
    passage = re.search(r"or copy these files(.*?)\n\n", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)[1]
    names = re.findall(r"`(dino_d2/\S+\.py)`", passage)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", COPIED, str(onnx_file)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(OnnxPredictor(onnx_file)(np.full((90, 120, 3), 128, np.uint8))) > 0


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx"):
        OnnxPredictor("nowhere.onnx")
