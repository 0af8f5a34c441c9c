from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.utils.file_io import PathManager
from torch.optim.swa_utils import AveragedModel

from dino_d2.tools import convert_checkpoint
from tests.checkpoint.test_checkpointer import Storage
from tests.checkpoint.test_convert import published_by

CONFIG = ["--config-file", "dino_r50_4scale_12ep"]
SMALL = [
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.DINO.HIDDEN_DIM", "32",
    "MODEL.DINO.NHEADS", "4", "MODEL.DINO.DIM_FEEDFORWARD", "16", "MODEL.DINO.ENC_LAYERS", "1",
    "MODEL.DINO.DEC_LAYERS", "2", "MODEL.DINO.NUM_QUERIES", "6", "MODEL.DINO.NUM_CLASSES", "91",
]  # fmt: skip


def test_there_and_back_with_options_last(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = published_by("official")
    published, ours, back = (str(tmp_path / name) for name in ("published.pth", "ours.pth", "back.pth"))
    torch.save({"model": state}, published)
    convert_checkpoint.main(["--source", "auto", published, ours, *CONFIG, *SMALL])
    convert_checkpoint.main(["--to", "official", ours, back, *CONFIG, *SMALL])
    result = torch.load(back, weights_only=True)["model"]
    assert set(result) == set(state)
    assert all(torch.equal(result[name], state[name]) for name in state)
    assert "tensors" in capsys.readouterr().out


def said(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What a command that ends with the exit code of users' errors says."""
    with pytest.raises(SystemExit) as stopped:
        convert_checkpoint.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_config_in_mmdetections_file_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    published, ours = str(tmp_path / "epoch_12.pth"), tmp_path / "ours.pth"
    meta = {"cfg": "positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5, temperature=10000)"}
    values = [*SMALL, "MODEL.DINO.SHARE_HEADS", "False"]
    torch.save({"meta": meta, "state_dict": published_by("mmdet", "MODEL.DINO.SHARE_HEADS", "False")}, published)
    arguments = ["--source", "auto", published, str(ours), *CONFIG, *values]
    error = said(capsys, *arguments)
    assert re.search(r"epoch_12\.pth: .*\n.*POS_TEMPERATURE is 20\.0, the weights are for 10000\.0", error)
    assert not ours.exists()
    convert_checkpoint.main([*arguments, "MODEL.DINO.POS_TEMPERATURE", "10000.0", "MODEL.DINO.POS_OFFSET", "-0.5"])
    assert ours.exists()


def test_checkpoint_that_does_not_fit_stops_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    published, ours = tmp_path / "published.pth", tmp_path / "ours.pth"
    torch.save({"model": published_by("official")}, published)
    error = said(capsys, "--source", "official", str(published), str(ours), *CONFIG, *SMALL[:-1], "3")
    assert re.search(r"published\.pth: .*does not match", error)
    assert not ours.exists()


def test_average_is_taken_out_of_a_checkpoint_of_training(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    average = AveragedModel(model)
    torch.nn.init.constant_(average.module.weight, 7)
    training = {"model": model.state_dict(), "trainer": {"hooks": {"EMA": average.state_dict()}}, "iteration": 3}
    torch.save(training, tmp_path / "model_0000003.pth")
    arguments = [str(tmp_path / "model_0000003.pth"), str(tmp_path / "ema.pth"), *CONFIG, *SMALL]
    convert_checkpoint.main(["--source", "ema", *arguments])
    found = torch.load(tmp_path / "ema.pth", weights_only=True)["model"]
    assert found.keys() == model.state_dict().keys()
    assert (found["weight"] == 7).all()


def test_output_lies_where_iopath_reaches(tmp_path: Path) -> None:
    PathManager.register_handler(Storage(tmp_path), allow_override=True)
    average = AveragedModel(torch.nn.Linear(2, 3))
    torch.save({"trainer": {"hooks": {"EMA": average.state_dict()}}}, tmp_path / "model.pth")
    arguments = [str(tmp_path / "model.pth"), "test://new/ema.pth", *CONFIG, *SMALL]
    convert_checkpoint.main(["--source", "ema", *arguments])
    assert torch.load(tmp_path / "new" / "ema.pth", weights_only=True)["model"].keys() == {"weight", "bias"}


def test_checkpoint_without_an_average_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": {}}, tmp_path / "model.pth")
    error = said(capsys, "--source", "ema", str(tmp_path / "model.pth"), "out.pth", *CONFIG, *SMALL)
    assert re.search(r"model\.pth has no moving average.*SOLVER\.EMA\.ENABLED", error)


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = said(capsys, "--source", "auto", str(tmp_path / "nowhere.pth"), "out.pth", *CONFIG)
    assert "nowhere.pth does not exist" in error
