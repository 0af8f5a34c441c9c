#!/usr/bin/env python3
"""Install detectron2, which is not on PyPI under its own name, into the current Python."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dino_d2_cli import CommandParser, user_errors

DESCRIPTION = """\
Installs the Python files of detectron2's main branch of 2024-04-17 from a wheel on PyPI, whose hash is checked, and
their dependencies. Its compiled operators are not installed: they are built for one old PyTorch version, and DINO does
not use them. An existing detectron2 is not changed."""
REQUIREMENT = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
METADATA_THERE, METADATA_HERE = "sal_detectron2-0.7.2.dist-info", "detectron2-0.7.2.dist-info"
NEEDS = [
    "Pillow", "yacs>=0.1.8", "omegaconf>=2.1,<2.4", "hydra-core>=1.1,<2", "tabulate", "cloudpickle", "termcolor",
    "tqdm", "tensorboard", "matplotlib", "packaging", "fvcore>=0.1.5,<0.1.6", "iopath>=0.1.7,<0.2",
    "pycocotools>=2.0.2",
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    CommandParser([""], DESCRIPTION).parse_args(arguments)
    found = importlib.util.find_spec("detectron2")
    if found:
        print(f"detectron2 is already installed: {Path(found.origin).parent}")
        return 0
    with user_errors():
        pip("install", *NEEDS)  # first: if it fails, the next attempt must not find detectron2 installed
        install(Path(sysconfig.get_paths()["purelib"]))
    print("detectron2 is installed")
    return 0


def install(site_packages: Path) -> None:
    """Download the wheel and unpack it.

    Raises:
        OSError: the download failed.
        ValueError: the hash of the wheel differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The wheel is tagged for one Python version, but its Python files work with all.
        pip("download", "--no-deps", "--dest", folder, "--python-version", "3.10", "--implementation", "cp",
            "--abi", "none", "--platform", "any", "--only-binary=:all:", REQUIREMENT)  # fmt: skip
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{wheel.name} has SHA-256 {found}, expected {SHA256}; nothing was installed")
        with zipfile.ZipFile(wheel) as archive:
            # Not the binary for another torch, nor the top-level package `tools`.
            files = [name for name in archive.namelist() if _is_wanted(name)]
            archive.extractall(site_packages, files)
            licence = archive.read(f"{METADATA_THERE}/LICENSE")
    _register(site_packages, files, licence)


def _register(site_packages: Path, files: list[str], licence: bytes) -> None:
    """Write metadata for pip list and uninstall; the wheel's own forbids NumPy 2 and requires a linter."""
    folder = site_packages / METADATA_HERE
    folder.mkdir()
    contents = {
        "METADATA": b"Metadata-Version: 2.1\nName: detectron2\nVersion: 0.7.2\nLicense: Apache-2.0\n",
        "INSTALLER": b"dino-d2\n",
        "LICENSE": licence,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    listed = [*files, *(f"{METADATA_HERE}/{name}" for name in (*contents, "RECORD"))]
    (folder / "RECORD").write_text("".join(f"{name},,\n" for name in listed if not name.endswith("/")))


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "--quiet", *arguments[1:]]
    if subprocess.run(command).returncode:
        raise OSError(f"`{' '.join(command)}` failed; see above")


def _is_wanted(name: str) -> bool:
    return name.startswith("detectron2/") and not Path(name).name.startswith("_C")


if __name__ == "__main__":
    sys.exit(main())
