"""tools/install_detectron2.py, which is `dino-d2 install-detectron2`, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_d2.tools import install_detectron2


def test_detectron2_is_not_unpacked_if_its_dependencies_cannot_be_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Or the next attempt would find it installed."""
    unpacked: list[Path] = []

    def no_network(*arguments: str) -> None:
        raise OSError(f"`pip {arguments[0]}` failed")

    monkeypatch.setattr(install_detectron2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(install_detectron2, "pip", no_network)
    monkeypatch.setattr(install_detectron2, "install", unpacked.append)
    with pytest.raises(SystemExit) as end:
        install_detectron2.main([])
    assert end.value.code == 2
    assert "`pip install` failed" in capsys.readouterr().err
    assert unpacked == []
