"""docs/quickstart.ipynb runs from top to bottom without a network."""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"
EPOCHS = "--epochs 40"


def test_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an epoch of training in place of forty."""

    def refuse(*_: object) -> None:
        raise AssertionError("the notebook asks for a network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sum(EPOCHS in source for source in sources) == 1
    names: dict[str, object] = {}
    for source in sources:
        exec(source.replace(EPOCHS, "--epochs 1"), names)
    assert names["work"].parent == tmp_path
    assert (names["work"] / "run" / "model_best.pth").is_file()
    assert len(names["everything"]) == 8
    assert names["detector"].class_names == ("red", "blue")
