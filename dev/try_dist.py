#!/usr/bin/env python3
"""`make dist`: build the sdist and the wheel, and test each in an environment outside the repository.

Runs the doctor, a prediction with a recipe's name and two training steps. Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
RECIPE = "small/dino_mobilenetv2_640"
# Files needed for a build with CUDA, and for an installation.
IN_SDIST = ["ops/csrc/cuda/primitives.cuh", "ops/csrc/cuda/ms_deform_attn_cuda.cu", "ops/csrc/cpu/vector.h", "setup.py"]
IN_WHEEL = [
    "dino_d2/configs/dino_r50_4scale_12ep.yaml", f"dino_d2/configs/{RECIPE}.yaml", "dino_d2/tools/train_net.py",
    "dino_d2/model_zoo/zoo.yaml", "dino_d2_cli.py", "dino_d2/report/templates/report.html",
    "dino_d2/report/templates/page.css", "dino_d2/report/templates/chart.js",
]  # fmt: skip
MAKE_INPUTS = f"""
import json, numpy, torch
from PIL import Image
from detectron2.modeling import build_model
from dino_d2 import load_config

cfg = load_config({RECIPE!r}, ["MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False])
torch.save({{"model": build_model(cfg).state_dict()}}, "weights.pth")
Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=numpy.uint8)).save("photo.png")
"""
ANNOTATIONS = {
    "images": [{"id": 1, "file_name": "photo.png", "height": 96, "width": 128}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 20, 50, 40], "area": 2000, "iscrowd": 0}],
    "categories": [{"id": 1, "name": "cat"}],
}


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    if subprocess.run(list(map(str, command)), cwd=cwd, env=environment).returncode:
        sys.exit(f"make dist: `{' '.join(map(str, command))}` failed")


def build() -> tuple[Path, Path]:
    """Build the sdist (as on a machine without CUDA) and the wheel."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", DIST, cwd=ROOT, FORCE_CUDA="0")
    with tempfile.TemporaryDirectory() as folder:  # in build/ modules that were renamed or deleted would still be found
        build = ("build", "--build-base", folder)
        run(sys.executable, "setup.py", "--quiet", *build, "bdist_wheel", "--dist-dir", DIST, cwd=ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    with tarfile.open(sdist) as archive:
        _check(sdist, IN_SDIST, {name.partition("/")[2] for name in archive.getnames()})
    with zipfile.ZipFile(wheel) as archive:
        _check(wheel, IN_WHEEL, set(archive.namelist()))
    return sdist, wheel


def _check(path: Path, wanted: list[str], names: set[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        sys.exit(f"make dist: {path.name} lacks {', '.join(missing)}")


def try_out(distribution: Path, python: Path, folder: Path) -> None:
    """Install and use a distribution in its own folder."""
    folder.mkdir()
    dino = python.parent / "dino-d2"
    run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "--force-reinstall", "--no-deps", distribution,
        cwd=folder)  # fmt: skip
    run(dino, "install-detectron2", cwd=folder)
    run(dino, "doctor", cwd=folder)
    run(python, "-W", "ignore", "-c", MAKE_INPUTS, cwd=folder)
    run(dino, "predict", "--config-file", RECIPE, "--weights", "weights.pth", "--input", "photo.png",
        "--output", "found", "--score-threshold", "0", cwd=folder)  # fmt: skip
    if not json.loads((folder / "found" / "photo.json").read_text()):
        sys.exit("make dist: nothing was found")
    (folder / "train.json").write_text(json.dumps(ANNOTATIONS))
    run(dino, "train", "--config-file", RECIPE, "--train-json", "train.json", "--train-images", ".",
        "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "1", "SOLVER.STEPS", "()", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.TIMM.PRETRAINED", "False", "OUTPUT_DIR", "run", cwd=folder)  # fmt: skip
    if not (folder / "run" / "model_final.pth").is_file():
        sys.exit("make dist: training left no weights")


def main() -> None:
    sdist, wheel = build()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "-r", ROOT / "requirements" / "runtime.txt", cwd=folder)
        try_out(wheel, python, folder / "wheel")
        try_out(sdist, python, folder / "sdist")
    print(f"make dist: {wheel.name} and {sdist.name} work")


if __name__ == "__main__":
    main()
