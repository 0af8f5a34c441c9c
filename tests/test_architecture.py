"""The rules of the house, read from the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from dino_d2 import add_dino_config

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "dino_d2").rglob("*.py"))
OP = sorted((ROOT / "ops").glob("*.py"))
TOOLS = [ROOT / "dino_d2_cli.py", *sorted((ROOT / "tools").rglob("*.py")), *sorted((ROOT / "dev").rglob("*.py"))]
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "overlays")


def each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", files, ids=[str(path.relative_to(ROOT)) for path in files])


def imported_modules(path: Path) -> Iterator[str]:
    """Full names: relative imports resolved, `from package import name` as "package" and "package.name"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = parts[: len(parts) - node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


PORTABLE = [
    ROOT / "dino_d2" / name
    for name in (
        "modeling/denoising.py", "modeling/query_selection.py", "modeling/box_refinement.py", "evaluation/atd.py",
        "constants.py", "geometry.py", "structures.py",
    )
    if (ROOT / "dino_d2" / name).exists() or name != "evaluation/atd.py"
]  # fmt: skip


@each(PORTABLE)
def test_ideas_of_the_paper_can_be_lifted_out(path: Path) -> None:
    """They import torch, the standard library and the small modules beside them, nothing else."""

    def portable(module: str) -> bool:
        top = module.split(".")[0]
        ours = ("dino_d2.constants", "dino_d2.geometry", "dino_d2.structures")
        return top == "torch" or top in sys.stdlib_module_names or module.startswith(ours)

    assert [module for module in imported_modules(path) if not portable(module)] == []


CONSTRUCTORS = [
    path
    for path in (ROOT / "dino_d2" / "modeling").rglob("*.py")
    if path.name != "build.py" and path.parent.name != "backbone"
]


@each(CONSTRUCTORS)
def test_config_stays_at_the_door(path: Path) -> None:
    assert [module for module in imported_modules(path) if module.startswith("detectron2.config")] == []
    names = {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
    assert "cfg" not in names


@each(PACKAGE)
def test_device_comes_from_tensors(path: Path) -> None:
    strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    assert [text for text in strings if isinstance(text, str) and "cuda" in text] == []


@each([*PACKAGE, *OP, *TOOLS])
def test_no_error_is_swallowed_unseen(path: Path) -> None:
    handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    assert [handler.lineno for handler in handlers if handler.type is None] == []


def leaves(cfg: CfgNode, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in cfg.items():
        keys |= leaves(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {f"{prefix}{name}"}
    return keys


def added_keys() -> list[str]:
    cfg = get_cfg()
    before = leaves(cfg)
    add_dino_config(cfg)
    return sorted(leaves(cfg) - before)


@pytest.mark.parametrize("key", added_keys())
def test_every_config_key_is_read_somewhere(key: str) -> None:
    readers = [path for path in [*PACKAGE, *TOOLS] if path != ROOT / "dino_d2" / "config.py"]
    attribute = re.compile(rf"\.{key.split('.')[-1]}\b")
    assert any(attribute.search(path.read_text()) for path in readers)


@each(RECIPES)
def test_every_recipe_loads(path: Path) -> None:
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.META_ARCHITECTURE == "DINO"
