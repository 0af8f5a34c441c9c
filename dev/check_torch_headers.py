#!/usr/bin/env python3
"""Compile the op and its baseline against the headers of other PyTorch versions.

    dev/check_torch_headers.py                 the oldest with the stable ABI, and one in between
    dev/check_torch_headers.py 2.12.0

Downloads each wheel from the package index (500 MB and more) without installing it. The exit code is 1 if compilation
fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["2.10.0", "2.11.0"]
COMMON = ["-c", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def fetch_headers(version: str, folder: Path) -> Path:
    """Download the headers of a version; returns the include folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    subprocess.run([*command, f"torch=={version}"], check=True)
    (wheel,) = folder.glob(f"torch-{version}*.whl")
    with zipfile.ZipFile(wheel) as archive:
        headers = [name for name in archive.namelist() if name.startswith("torch/include/")]
        archive.extractall(folder / version, headers)
    wheel.unlink()
    return folder / version / "torch" / "include"


def compile_all(include: Path) -> list[str]:
    """Compiler messages for the sources that do not compile."""
    paths = [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-I{sysconfig.get_paths()['include']}"]
    cpp = ["g++", "-fPIC", *COMMON, *paths]
    cuda = [
        "nvcc",
        "-DUSE_CUDA",
        "--expt-relaxed-constexpr",
        "-arch=sm_90",
        "-DDINO_D2_CUDA_CODE=sm_90",
        *COMMON,
        *paths,
    ]
    # kernels_*.cpp do not use torch.
    sources = [(cpp, path) for path in ROOT.glob("ops/csrc/**/*.cpp") if not path.name.startswith("kernels_")]
    if shutil.which("nvcc"):
        sources += [(cuda, path) for folder in ("ops", "dev") for path in ROOT.glob(f"{folder}/**/*.cu")]
    else:
        print("nvcc not found: skipping the CUDA sources")
    failures = []
    for command, source in sources:
        result = subprocess.run([*command, str(source), "-o", "/dev/null"], capture_output=True, text=True)
        if result.returncode != 0:
            failures.append(f"{source.relative_to(ROOT)}\n{result.stderr}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    failed = False
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as folder:
            failures = compile_all(fetch_headers(version, Path(folder)))
        print(f"torch {version}: " + ("compiles" if not failures else "does not compile\n" + "\n".join(failures)))
        failed |= bool(failures)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
