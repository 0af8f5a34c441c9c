"""tools/app.py, which is `dino-d2 app`. What the page does: tests/test_app.py."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch

from dino_d2 import load_config
from dino_d2.engine import DINOTrainer
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("app")
    data = write_rectangles(folder / "data", count=1, size=64)
    values = config_values(data, folder / "out", "app_rectangles")
    model = DINOTrainer.build_model(load_config(str(RECIPE), values))
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return ["--weights", str(folder / "weights.pth"), "--config-file", str(RECIPE), "--device", "cpu", *values]


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the page needs gradio")
def test_page_is_served_on_the_next_free_port_until_it_is_stopped(arguments: list[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        proxy = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")  # where nobody answers
        process = subprocess.Popen(
            [sys.executable, "tools/app.py", "--port", str(port), *arguments],
            cwd=ROOT,
            env=os.environ | proxy | {"TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            assert address, line
            assert int(address[1]) > port
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert (
                f"DINO · {Path(arguments[1]).parent.name}/weights.pth"
                in direct.open(address[0], timeout=20).read().decode()
            )
            assert list(tmp_path.glob("dino_d2_app_*"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not list(tmp_path.glob("dino_d2_app_*"))


def test_help_begins_with_an_example() -> None:
    result = subprocess.run([sys.executable, "tools/app.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("Examples:\n    app.py --weights ")


def test_without_gradio_it_is_said_how_to_get_it(arguments: list[str]) -> None:
    code = "import sys; sys.modules['gradio'] = None; from dino_d2.tools.app import main; main(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'dino-d2[app]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_weights_are_named() -> None:
    pytest.importorskip("gradio")
    command = [sys.executable, "tools/app.py", "--weights", "nowhere.pth"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "weights nowhere.pth not found" in result.stderr
    assert "Traceback" not in result.stderr
