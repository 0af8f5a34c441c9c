"""Published weights by name: an own web server stands for the publishers'."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from dino_d2 import Detector, load_config, model_zoo
from dino_d2.checkpoint import Assumptions, DINOCheckpointer
from dino_d2.model_zoo import weights as module
from dino_d2.tools import zoo
from tests.web import Web, serve

NAMES = Path(__file__).parents[1] / "golden" / "state_dict_detrex_dino_r50.json"
NAME = "dino_r50_4scale_12ep"
FILE = f"/{model_zoo.find(NAME).file}"


@pytest.fixture(scope="module")
def published() -> bytes:
    """A file of the published names and shapes; of the values it matters that they are finite and none is alike."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in json.loads(NAMES.read_text()).items():
        stored_again = f"transformer.decoder.{name}"  # heads have two names
        state[name] = state.get(stored_again, torch.rand(shape, generator=generator) * 0.02)
    file = io.BytesIO()
    torch.save({"model": state}, file)
    return file.getvalue()


@pytest.fixture
def web(published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with serve() as web:
        web.files[FILE] = published
        monkeypatch.setenv("DINO_D2_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("DINO_D2_ZOO_URL", web.url)
        yield web


@pytest.mark.parametrize("name", model_zoo.entries())
def test_every_entry_has_a_recipe_and_facts(name: str) -> None:
    entry = model_zoo.find(name)
    cfg = model_zoo.get_config(name, trained=True)
    assert f"dino://{name}" == cfg.MODEL.WEIGHTS == model_zoo.get_checkpoint_url(name)
    assert not cfg.MODEL.DINO.SHARE_HEADS
    assert name.startswith(entry.recipe.removesuffix("_tuned"))
    assert re.fullmatch(r"https://\S+\.pth", entry.url)
    assert re.fullmatch(r"([0-9a-f]{8})?", entry.sha256)
    assert entry.parameters > 40
    assert entry.gflops > 200
    assert 49 <= entry.ap < 60


def test_names_are_detectron2s_functions() -> None:
    assert model_zoo.get_config_file("dino_r50_4scale_12ep_ema").endswith("dino_r50_4scale_12ep.yaml")
    assert model_zoo.get_config_file("small/dino_r18_640.yaml").endswith("small/dino_r18_640.yaml")
    untrained = model_zoo.get_config(NAME)
    assert untrained.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    assert untrained.MODEL.DINO.POS_TEMPERATURE == 10000
    assert load_config(NAME).MODEL.DINO.POS_TEMPERATURE == 20  # the faithful recipe of that name
    with pytest.raises(ValueError, match=r"dino_r50_4scale_13ep; did you mean dino_r50_4scale_12ep"):
        model_zoo.get_checkpoint_url("dino_r50_4scale_13ep")


def test_weights_are_loaded_and_converted_once_and_everything_takes_their_name(
    web: Web, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    small = ["INPUT.MIN_SIZE_TEST", 64, "MODEL.DEVICE", "cpu"]

    detections = Detector.from_pretrained(NAME, overrides=small)(picture, threshold=0)
    cfg = model_zoo.get_config(NAME, trained=True)
    cfg.merge_from_list(small)
    instances = DefaultPredictor(cfg)(picture[:, :, ::-1])["instances"]
    assert len(detections) == len(instances) == 300
    assert np.array_equal(detections.boxes, instances.pred_boxes.tensor.numpy())
    assert detections.names[0] in {"person", "toothbrush", *detections.class_names}
    assert len(detections.class_names) == 80

    assert [path for path, _ in web.requests] == [FILE]
    files = {path.name for path in (tmp_path / "cache").rglob("*.pth")}
    assert files == {f"{NAME}.pth"}  # the converted one alone is kept
    assert zoo.main([NAME]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{NAME} ")]
    assert re.search(r"49\.2 +detrex +Apache-2\.0 +yes", line)

    with pytest.raises(ValueError, match=rf"SHARE_HEADS(.|\n)*get_config\('{NAME}', trained=True\)"):
        DINOCheckpointer(build_model(load_config(NAME, ["MODEL.DEVICE", "cpu"]))).load(f"dino://{NAME}")


def test_two_processes_load_once(web: Web) -> None:
    command = [sys.executable, "-m", "dino_d2", "zoo", "--download", NAME]
    first, second = (subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) for _ in range(2))
    paths = {process.communicate(timeout=300)[0] for process in (first, second)}
    assert first.returncode == second.returncode == 0
    (path,) = paths
    assert Path(path.decode().strip()).is_file()
    assert [path for path, _ in web.requests] == [FILE]


def test_without_a_network_it_is_said_what_to_put_where(
    published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO_D2_CACHE", str(tmp_path))
    monkeypatch.setenv("DINO_D2_ZOO_URL", "http://127.0.0.1:1")
    with pytest.raises(model_zoo.DownloadError) as error:
        module.local_weights(NAME)
    place = Path(re.search(r"download \S+_49_2AP\.pth from .* copy it to (\S+),", str(error.value))[1])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(published)
    converted = torch.load(module.local_weights(NAME), weights_only=True)["model"]
    assert Assumptions.from_tensor(converted["_extra_state"]).zoo_name == NAME
    assert place.exists()  # it is the user's


def test_file_of_another_model_is_named(web: Web) -> None:
    file = io.BytesIO()
    torch.save({"model": {"transformer.encoder.layers.0.attentions.0.value_proj.weight": torch.ones(2)}}, file)
    web.files[FILE] = file.getvalue()
    with pytest.raises(ValueError, match=r"is not the file published as dino_r50_4scale_12ep"):
        module.local_weights(NAME)
