#!/usr/bin/env python3
"""Create ``.venv`` with everything that dino_d2 needs, and build the op. Standard library only.

Can be run repeatedly: each completed step is recorded in ``.venv/setup.json`` with a digest of its inputs, and skipped
while that matches. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
RECORD = VENV / "setup.json"
OLDEST_PYTHON = (3, 10)


def say(message: str) -> None:
    print(f"[setup] {message}", flush=True)


def fail(message: str) -> None:
    sys.exit(f"[setup] failed: {message}")


def run(*command: str | Path) -> None:
    """Run a command in the repository root; exit with its name if it fails."""
    result = subprocess.run([str(part) for part in command], cwd=ROOT)
    if result.returncode != 0:
        fail(f"`{' '.join(str(part) for part in command)}` exited with {result.returncode}; see above.")


def digest(*paths: Path, extra: str = "") -> str:
    state = hashlib.sha256(extra.encode())
    for path in sorted(paths):
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def recorded() -> dict[str, str]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def step(name: str, key: str, action, still_there=lambda: True) -> None:
    """Run `action` unless it was already completed for the same `key`."""
    if recorded().get(name) == key and still_there():
        say(f"{name}: up to date")
        return
    say(f"{name}: working …")
    action()
    state = recorded() | {name: key}
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=2))
    temporary.replace(RECORD)


def check_machine() -> None:
    if sys.version_info < OLDEST_PYTHON:
        version = ".".join(map(str, sys.version_info[:3]))
        wanted = ".".join(map(str, OLDEST_PYTHON))
        fail(f"Python {wanted} or newer is required, this is {version}. Try `make setup PYTHON=python3.11`.")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "c++", "g++", "clang++")):
        fail("no C++ compiler found (Debian: `apt-get install g++`; Fedora: `dnf install gcc-c++`).")
    if shutil.which("nvcc"):
        say("nvcc found: building the op with CUDA kernels")
    else:
        say("nvcc not found: building the op for the CPU only")


def create_venv() -> None:
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if subprocess.run(command).returncode != 0:
        fail(f"`{' '.join(command)}` failed (Debian: `apt-get install python3-venv`).")


def build_op() -> None:
    run(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
    run(PYTHON, "-c", "from dino_d2.ops import require_compiled; require_compiled()")


def op_is_built() -> bool:
    return any((ROOT / "ops").glob("_C*.so"))


def main() -> None:
    check_machine()
    version = sys.version.split()[0]
    if not PYTHON.exists() or recorded().get("venv") != version:
        say(f"creating .venv with Python {version}")
        create_venv()
    step("venv", version, lambda: None)
    # setup.json records the requirements, so that the index is not queried if nothing changed.
    requirements = sorted([*(ROOT / "requirements").glob("*.txt"), *(ROOT / "examples").glob("*/requirements.txt")])
    step(
        "packages (torch alone can take minutes)",
        digest(*requirements),
        lambda: run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off",
                    *(part for path in requirements for part in ("-r", path))),
    )  # fmt: skip
    installer = ROOT / "tools" / "install_detectron2.py"
    step("detectron2", digest(installer), lambda: run(PYTHON, "dino_d2_cli.py", "install-detectron2"))
    sources = [path for path in (ROOT / "ops" / "csrc").rglob("*") if path.is_file()]
    build_settings = "|".join(
        f"{name}={os.environ.get(name, '')}" for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX")
    )
    key = digest(*sources, ROOT / "setup.py", ROOT / "pyproject.toml", extra=f"{build_settings}|{shutil.which('nvcc')}")
    step("deformable-attention op and dino_d2", key, build_op, op_is_built)
    say("ready: .venv/bin/python")


if __name__ == "__main__":
    main()
