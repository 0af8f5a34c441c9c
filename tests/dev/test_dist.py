"""What the archives of `make dist` hold; that they work, dev/try_dist.py tries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from dev.try_dist import IN_SDIST

ROOT = Path(__file__).parents[2]
SHIPPED = ("configs", "dino_d2", "ops", "tools", "dino_d2_cli.py", "setup.py", "pyproject.toml", "MANIFEST.in")
MORE = ("README.md", "LICENSE", "CHANGELOG.md")


def test_sdist_made_without_cuda_holds_what_a_build_with_cuda_needs(tmp_path: Path) -> None:
    for name in (*SHIPPED, *MORE):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "_C*", "ops@"))
        else:
            shutil.copy(source, tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "sdist"]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"FORCE_CUDA": "0"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert set(IN_SDIST) <= names
    kept = [".py", ".yaml", ".h", ".cuh", ".cpp", ".cu"]
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder in ("configs", "ops", "tools", "dino_d2")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kept and not {"ops", "configs", "tools"} & set(path.relative_to(ROOT).parts[1:-1])
    ]
    assert [name for name in sources if name not in names] == []
