from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dino_d2 import doctor, ops


def run_doctor(before: str = "") -> subprocess.CompletedProcess:
    script = f"import sys\n{before}\nfrom dino_d2.doctor import main\nsys.exit(main())"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)


def test_healthy_installation() -> None:
    result = subprocess.run([sys.executable, "-W", "ignore", "-m", "dino_d2.doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (
        f"torch                  {torch.__version__.split('+')[0]}",
        "all checks passed",
        "generic",
        "float64 on cpu",
    ):
        assert line in result.stdout
    assert f"uses {torch.ops.dino_d2.cpu_kernels()}" in result.stdout
    assert "BAD" not in result.stdout


def test_missing_binary_is_not_well_and_says_what_to_do() -> None:
    result = run_doctor('sys.modules["dino_d2.ops._C"] = None')
    assert result.returncode == 1
    assert "BAD kernels for cpu" in result.stdout
    assert "could not be loaded" in result.stdout
    assert "pip install --no-build-isolation -e ." in result.stdout


@pytest.mark.parametrize("name", ["ms_deform_attn", "ms_deform_attn_fused"])
def test_kernel_that_computes_something_else_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *arguments: 1.001 * right(*arguments))
    assert doctor.main() == 1
    assert "BAD float32 on cpu" in capsys.readouterr().out


WITHOUT_DETECTRON2 = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.metadata
real = importlib.metadata.version

def version(name):
    if name == "detectron2":
        raise importlib.metadata.PackageNotFoundError
    return real(name)

importlib.metadata.version = version
"""


def test_without_detectron2_it_is_said_how_it_comes() -> None:
    result = run_doctor(WITHOUT_DETECTRON2)
    assert result.returncode == 1, result.stderr
    assert "BAD detectron2             not installed: dino-d2 install-detectron2" in result.stdout
    assert "ok  float32 on cpu" in result.stdout
    script = f"{WITHOUT_DETECTRON2}\nfrom dino_d2 import Detector"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "dino_d2.Detector needs detectron2: dino-d2 install-detectron2" in result.stderr
