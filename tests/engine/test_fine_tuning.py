"""The trainer and tools/train_net.py load weights through `DINOCheckpointer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import PeriodicCheckpointer

from dino_d2 import load_config
from dino_d2.checkpoint.assumptions import EXTRA_STATE, Assumptions
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.engine.run import train_or_evaluate
from dino_d2.tools import train_net
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "configs" / "dino_r50_4scale_12ep.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with the checkpoint of a training step, and the config values of it."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    data = write_rectangles(folder / "data", count=2, size=64)
    values = [
        *config_values(data, folder / "out", "fine_tuning"),
        "INPUT.MIN_SIZE_TRAIN",
        "[64]",
        "SOLVER.MAX_ITER",
        "1",
    ]
    trainer_for(values).train()
    return folder / "out", values


def trainer_for(values: list[str], *overrides: str) -> DINOTrainer:
    cfg = load_config(RECIPE, [*values, *overrides])
    register_datasets(cfg)
    return DINOTrainer(cfg)


def data_of(trained: tuple[Path, list[str]]) -> tuple[Path, Path]:
    folder = trained[0].parent / "data"
    return folder / "annotations.json", folder / "images"


def swapped(folder: Path, data: tuple[Path, Path]) -> list[str]:
    """The same images with the classes in the other order."""
    content = json.loads(data[0].read_text())
    content["categories"] = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
    annotations, name = folder / "swapped.json", f"swapped_{folder.name}"
    annotations.write_text(json.dumps(content))
    entries = str([[name, str(annotations), str(data[1])]])
    sets = ["DATASETS.COCO_FORMAT", entries, "DATASETS.TRAIN", f"['{name}']", "DATASETS.TEST", f"['{name}']"]
    return ["MODEL.DINO.CLASS_NAMES", "['blue', 'red']", *sets]


def rows(trainer: DINOTrainer) -> torch.Tensor:
    return trainer.model.decoder.class_heads[0].weight.detach()


def test_training_checkpoint_is_mere_tensors_and_knows_its_classes(trained: tuple[Path, list[str]]) -> None:
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    assert content["iteration"] == 0
    assert "optimizer" in content["trainer"]["_trainer"]
    assert Assumptions.from_tensor(content["model"][EXTRA_STATE]).class_names == ("red", "blue")


def test_training_resumes_with_the_same_classes_only(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    trainer = trainer_for(trained[1])
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1
    saving = [hook for hook in trainer._hooks if isinstance(hook, PeriodicCheckpointer)]
    assert [hook.checkpointer for hook in saving] == [trainer.checkpointer]
    other = trainer_for(trained[1], *swapped(tmp_path, data_of(trained)))
    with pytest.raises(ValueError, match="Training cannot be resumed"):
        other.resume_or_load(resume=True)


def test_new_training_starts_from_rows_of_the_same_names(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    weights = ("MODEL.WEIGHTS", str(trained[0] / "model_final.pth"), "OUTPUT_DIR", str(tmp_path))
    other = trainer_for(trained[1], *weights, *swapped(tmp_path, data_of(trained)))
    same = trainer_for(trained[1], *weights)
    for trainer in (other, same):
        trainer.resume_or_load(resume=False)
    assert not torch.equal(rows(same)[0], rows(same)[1])
    assert torch.equal(rows(other), rows(same).flip(0))


def test_evaluation_of_classes_that_the_weights_lack_is_refused(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    green = ["MODEL.DINO.CLASS_NAMES", "['red', 'green']", "OUTPUT_DIR", str(tmp_path)]
    weights = ["MODEL.WEIGHTS", str(trained[0] / "model_final.pth")]
    options = ["--config-file", RECIPE, "--eval-only", *trained[1], *weights, *green]
    with pytest.raises(SystemExit, match="2"):
        train_or_evaluate(train_net.parse(options))
    assert "newly initialised (1): green" in capsys.readouterr().err


def test_only_a_config_that_says_so_trusts_files(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    content = torch.load(trained[0] / "model_final.pth", weights_only=True) | {"author": Path("me")}
    torch.save(content, tmp_path / "objects.pth")
    weights = ("MODEL.WEIGHTS", str(tmp_path / "objects.pth"), "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"MODEL\.TRUST_WEIGHTS"):
        trainer_for(trained[1], *weights).resume_or_load(resume=False)
    trusting = trainer_for(trained[1], *weights, "MODEL.TRUST_WEIGHTS", "True")
    trusting.resume_or_load(resume=False)
    assert torch.equal(rows(trusting), content["model"]["decoder.class_heads.0.weight"])
