"""What OnnxPredictor does before and after the session, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys

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


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx"):
        OnnxPredictor("nowhere.onnx")
