"""Files of other programs: what they hold besides weights is neither run nor needed."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_d2.checkpoint import read_published
from dino_d2.checkpoint.files import TENSORS_ONLY, average_of

# What MMDetection's own training writes, by a program of which nothing is left afterwards.
WRITE_MMDETECTION = """
import collections, sys, types
import numpy as np, torch

history = types.ModuleType("mmengine.logging.history_buffer")
class HistoryBuffer:
    def __init__(self):
        self._log_history = np.array([1.0, 2.0])
        self._statistics = {"mean": len}
        self._recent = collections.deque([np.float64(3)], maxlen=10)
HistoryBuffer.__module__ = history.__name__
HistoryBuffer.__qualname__ = "HistoryBuffer"
history.HistoryBuffer = HistoryBuffer
for name in ("mmengine", "mmengine.logging", history.__name__):
    sys.modules[name] = history if name == history.__name__ else types.ModuleType(name)

state = collections.OrderedDict(w=torch.arange(6.0).view(2, 3))
state._metadata = {"": {"version": 1}}
torch.save({
    "meta": {"cfg": "model = dict()", "epoch": 12, "rank": np.int64(0), "seed": np.float64(0.5)},
    "state_dict": state,
    "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "numbers": np.arange(3), "kinds": {HistoryBuffer}},
}, sys.argv[1], _use_new_zipfile_serialization=sys.argv[2] == "zip")
"""


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_mmdetections_own_checkpoints_are_read_without_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "epoch_12.pth"
    subprocess.run([sys.executable, "-c", WRITE_MMDETECTION, str(path), kind], check=True)
    assert b"history_buffer" in path.read_bytes()
    published = read_published(path)
    assert published.config == "model = dict()"
    assert list(published.state) == ["w"]
    assert torch.equal(published.state["w"], torch.arange(6.0).view(2, 3))
    assert "mmengine" not in sys.modules


@pytest.mark.parametrize("other", [np.float64(0.5), np.arange(3), argparse.Namespace(lr=np.float32(1)), {1, 2}])
def test_what_stands_beside_the_weights_does_not_matter(other: Any, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(2, 3).t())
    torch.save({"model": {"module.w": weight}, "trainer": {"nested": [other]}, "epoch": 11}, tmp_path / "w.pth")
    assert torch.equal(read_published(tmp_path / "w.pth").state["w"], weight)


class Trap:
    """Runs something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_that_a_file_names_is_run(legacy: bool, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    command = f"touch {sprung}"
    traps = [
        Trap(os.system, command),
        [{"deep": (Trap(eval, f"open({str(sprung)!r}, 'w')"),)}],
        Trap(getattr, Trap(__import__, "os"), "system"),
        Trap(Path.touch, sprung),
        Trap(subprocess.check_call, ["touch", str(sprung)]),
        OrderedDict(a=Trap(exec, f"open({str(sprung)!r}, 'w')")),
    ]
    content = {"model": {"w": torch.ones(2), "not_a_tensor": Trap(os.system, command)}, "args": traps}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert list(read_published(tmp_path / "w.pth").state) == ["w"]
    assert not sprung.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # a file that does it, if asked to
    assert sprung.exists()


def test_file_cannot_change_torch() -> None:
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    # "Take this function and set its __defaults__ to (1,)", as pickle says it.
    tampering = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86b."
    try:
        TENSORS_ONLY.load(io.BytesIO(tampering))
        assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    finally:
        torch._utils._rebuild_tensor_v2.__defaults__ = defaults


# As detrex keeps its average: parameters under the first of their names, and buffers.
AVERAGE = {"head.0.w": torch.full((2,), 5.0), "norm": torch.full((3,), 6.0)}


def test_average_of_detrex_takes_the_place_of_the_weights_under_all_names(tmp_path: Path) -> None:
    head = torch.zeros(2)
    model = {"head.0.w": head, "decoder.head.0.w": head, "norm": torch.zeros(3), "rest": torch.zeros(2)}
    torch.save({"model": model, "ema_state": AVERAGE}, tmp_path / "w.pth")
    state = read_published(tmp_path / "w.pth").state
    assert {name: tensor[0].item() for name, tensor in state.items()} == {
        "head.0.w": 5.0, "decoder.head.0.w": 5.0, "norm": 6.0, "rest": 0.0
    }  # fmt: skip


def test_average_of_detrex_alone(tmp_path: Path) -> None:
    torch.save({"ema_state": AVERAGE}, tmp_path / "w.pth")
    assert read_published(tmp_path / "w.pth").state.keys() == AVERAGE.keys()


@pytest.mark.parametrize(
    "content", [{"model": {}}, {"epoch": 3}, [torch.ones(2)], torch.ones(2), Trap(os.getcwd), {"model": "w.pth"}]
)
def test_file_without_weights_is_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not a checkpoint: it has no state dict"):
        read_published(tmp_path / "other.pth")


def damaged_files() -> dict[str, bytes]:
    whole = io.BytesIO()
    torch.save({"model": {"w": torch.ones(500)}, "other": Trap(os.getcwd)}, whole)
    return {
        "empty": b"",
        "text": b"<!DOCTYPE html><html>not found</html>",
        "cut": whole.getvalue()[:-400],
        "class made of an instance": pickle.dumps({"a": 1})[:-1] + b"(lp0\n\x81.",
    }


@pytest.mark.parametrize(("kind", "content"), damaged_files().items())
def test_damaged_file_is_named(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pth is damaged or not a checkpoint"):
        read_published(tmp_path / "bad.pth")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_published(tmp_path / "none.pth")


def test_torchscript_is_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pth"))
    with pytest.raises(ValueError, match=r"script\.pth is damaged or not a checkpoint.*TorchScript"):
        read_published(tmp_path / "script.pth")


def test_files_without_a_moving_average_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    for content in ({"model": {}}, {"trainer": argparse.Namespace(hooks={})}, [1]):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"{path} has no moving average"):
            average_of(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path} is damaged"):
        average_of(path)


def test_moving_average_is_read_beside_pickled_objects(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    average = {"n_averaged": torch.tensor(3), "module.w": torch.ones(2)}
    torch.save({"trainer": {"hooks": {"EMA": average}}, "args": argparse.Namespace()}, path)
    assert {name: value.tolist() for name, value in average_of(path).items()} == {"w": [1, 1]}
