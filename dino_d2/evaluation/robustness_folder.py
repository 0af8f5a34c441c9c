"""The folder of `dino-d2 robustness`: a file for each finished evaluation ("cell"), and the result of all.

The measure is that of Michaelis et al. (arXiv 1907.07484): mean performance under corruption (mPC), the mean AP over
the 15 corruptions and their 5 strengths, and the same relative to the AP on clean images (rPC).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .corruptions import CORRUPTIONS, STRENGTHS

RESULT, SETTINGS, CELLS, SHEET = "robustness.json", "settings.json", "cells", "corruptions.jpg"


@dataclass(frozen=True)
class Cell:
    """One evaluation: of images with a corruption ("": none), or resized to `size` times what the config says."""

    corruption: str = ""
    strength: int = 0
    size: float = 1.0

    @property
    def name(self) -> str:
        if self.corruption:
            return f"{self.corruption}_{self.strength}"
        return "clean" if self.size == 1 else f"size_{self.size:g}"


CLEAN = Cell()


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Begin an evaluation in this folder, or go on with it.

    Raises:
        ValueError: it holds another evaluation; the message names the differences.
    """
    path = folder / SETTINGS
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        _write(path, settings)
        return
    then, now = json.loads(path.read_text()), json.loads(json.dumps(settings))
    keys = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if keys:
        lines = "\n  ".join(f"{key} was {then.get(key)}, is now {now.get(key)}" for key in keys)
        raise ValueError(f"{folder} holds another evaluation:\n  {lines}\nGive another folder (-o), or delete that one")


def read_cells(folder: Path) -> dict[Cell, float]:
    """AP in percent of the finished cells."""
    found = [json.loads(path.read_text()) for path in sorted((folder / CELLS).glob("*.json"))]
    return {Cell(entry["corruption"], entry["strength"], entry["size"]): entry["AP"] for entry in found}


def write_cell(folder: Path, cell: Cell, ap: float) -> None:
    _write(folder / CELLS / f"{cell.name}.json", asdict(cell) | {"AP": ap})


def write_result(folder: Path) -> Path:
    path = folder / RESULT
    _write(path, summarize(read_cells(folder)))
    return path


def summarize(cells: dict[Cell, float]) -> dict[str, Any]:
    """The content of `robustness.json`.

    Args:
        cells: AP in percent of the finished cells.

    Returns:
        "corruptions": AP at strengths 1 to 5 by name, None where not evaluated; "clean": AP; "mPC": their mean, None
        before all 75 are there; "rPC": mPC in percent of clean; "sizes": AP by size.
    """
    names = [name for name in CORRUPTIONS if any(cell.corruption == name for cell in cells)]
    corruptions = {name: [cells.get(Cell(name, strength)) for strength in STRENGTHS] for name in names}
    every = [ap for row in corruptions.values() for ap in row if ap is not None]
    clean = cells.get(CLEAN)
    mean = sum(every) / len(every) if len(every) == len(CORRUPTIONS) * len(STRENGTHS) else None
    sizes = sorted(cell.size for cell in cells if not cell.corruption)
    return {
        "corruptions": corruptions,
        "clean": clean,
        "mPC": mean,
        "rPC": 100 * mean / clean if mean is not None and clean else None,
        "sizes": {f"{size:g}": cells[Cell(size=size)] for size in sizes},
    }


def as_table(result: dict[str, Any]) -> str:
    """The content of `robustness.json` as text."""
    rows = [
        [name.replace("_", " "), *row, sum(row) / len(row) if None not in row else None]
        for name, row in result["corruptions"].items()
    ]
    lines = [f"AP on clean images: {_shown(result['clean'])}"]
    if rows:
        columns = ["AP at strength", *map(str, STRENGTHS), "mean"]
        shown = [[name, *map(_shown, numbers)] for name, *numbers in rows]
        lines += ["", tabulate(shown, columns, tablefmt="simple", disable_numparse=True)]
    if result["mPC"] is not None:
        lines += ["", f"mPC, the mean of all: {_shown(result['mPC'])}; rPC, of clean AP: {_shown(result['rPC'])} %"]
    if len(result["sizes"]) > 1:
        columns = ["AP at size", *result["sizes"]]
        row = ["", *map(_shown, result["sizes"].values())]
        lines += ["", tabulate([row], columns, tablefmt="simple", disable_numparse=True)]
    return "\n".join(lines)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.replace(path)


def _shown(ap: float | None) -> str:
    return "–" if ap is None else f"{ap:.1f}"
