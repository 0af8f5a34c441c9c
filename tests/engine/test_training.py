"""Training end to end, through the same entry points that users have."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader

from dino_d2 import load_config
from dino_d2.data import build_train_augmentation, register_datasets
from dino_d2.engine import DINOTrainer
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"


@pytest.fixture(scope="module")
def four_pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rectangles(tmp_path_factory.mktemp("four"), count=4, size=128)


def trainer_for(data: tuple[Path, Path], output: Path, *overrides: str) -> DINOTrainer:
    name = f"test_{output.name}"
    cfg = load_config(str(RECIPE), [*config_values(data, output, name), *overrides])
    register_datasets(cfg)
    return DINOTrainer(cfg)


def losses_of(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [line["total_loss"] for line in lines if "total_loss" in line]


def test_tiny_model_overfits_four_pictures(four_pictures: tuple[Path, Path], tmp_path: Path) -> None:
    """Data, losses, gradients, matching and evaluation agree about what an object is."""
    output = tmp_path / "overfit"
    trainer = trainer_for(
        four_pictures, output, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "240", "SOLVER.STEPS", "(200,)"
    )
    torch.manual_seed(0)
    trainer.train()
    results = DINOTrainer.test(trainer.cfg, trainer.model)
    assert results["bbox"]["AP50"] > 90
    losses = losses_of(output)
    assert losses[-1] < 0.5 * losses[0]


def test_mixed_precision_lowers_the_loss(four_pictures: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "amp"
    amp = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.MAX_ITER", "40")
    trainer = trainer_for(four_pictures, output, *amp)
    trainer.train()
    losses = losses_of(output)
    assert losses[-1] < losses[0]


def test_pictures_without_objects_are_trained_on(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=2, size=64, empty=2)
    output = tmp_path / "empty"
    trainer = trainer_for(data, output, "SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN", "[64]")
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def run_train_net(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/train_net.py", "--config-file", str(RECIPE), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_train_save_resume_and_evaluate_from_the_command_line(four_pictures: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    values = config_values(four_pictures, output, "rectangles")
    first = run_train_net(*values, "SOLVER.MAX_ITER", "4")
    assert first.returncode == 0, first.stderr[-3000:]
    checkpoint = torch.load(output / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 3

    second = run_train_net("--resume", *values, "SOLVER.MAX_ITER", "6")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Starting training from iteration 4" in second.stdout
    assert torch.load(output / "model_final.pth", weights_only=False)["iteration"] == 5

    weights = str(output / "model_final.pth")
    expected = ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 50.0, 50.0]]")
    evaluation = run_train_net("--eval-only", *values, "MODEL.WEIGHTS", weights, *expected)
    assert evaluation.returncode == 0, evaluation.stderr[-3000:]
    assert "Results verification passed" in evaluation.stdout
    assert "AP,AP50,AP75" in evaluation.stdout


def test_more_gpus_than_there_are_is_an_error_that_says_so() -> None:
    result = run_train_net("--num-gpus", "99")
    assert result.returncode != 0
    assert "--num-gpus 99: only" in result.stderr


def test_saved_weights_predict_the_same(four_pictures: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = trainer_for(four_pictures, tmp_path / "saved", "SOLVER.MAX_ITER", "1")
    trainer.train()
    fresh = DINOTrainer.build_model(trainer.cfg)
    DetectionCheckpointer(fresh).load(str(tmp_path / "saved" / "model_final.pth"))
    image = {"image": torch.rand(3, 128, 128) * 255}
    with torch.no_grad():
        expected = trainer.model.eval()([dict(image)])[0]["instances"]
        found = fresh.eval()([dict(image)])[0]["instances"]
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=0)


class WithDetectron2sLoader(DINOTrainer):
    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        mapper = DatasetMapper(cfg, True, augmentations=[build_train_augmentation(cfg)])
        return build_detection_train_loader(cfg, mapper=mapper)


def test_detectron2s_own_loader_trains_with_a_warning(
    four_pictures: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config(
        str(RECIPE),
        [*config_values(four_pictures, tmp_path, "foreign"), "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"],
    )
    register_datasets(cfg)
    trainer = WithDetectron2sLoader(cfg)
    logging.getLogger("dino_d2").propagate = True
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert "a resumed run will not continue with the next images in order" in caplog.text
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["seed"] == 1


@pytest.mark.parametrize("names", ["['red']", "['blue','red']", "['red','blue','green']"])
def test_classes_are_compared_whoever_made_the_loader(
    four_pictures: tuple[Path, Path], tmp_path: Path, names: str
) -> None:
    values = config_values(four_pictures, tmp_path, f"compared_{tmp_path.name}")
    number = str(names.count(",") + 1)
    cfg = load_config(str(RECIPE), [*values, "MODEL.DINO.CLASS_NAMES", names, "MODEL.DINO.NUM_CLASSES", number])
    register_datasets(cfg)
    with pytest.raises(ValueError, match=r"MODEL\.DINO\.(NUM_CLASSES|CLASS_NAMES).*red, blue"):
        WithDetectron2sLoader(cfg)


def test_what_dino_d2_says_is_in_the_log_file(four_pictures: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from dino_d2.engine import run\n"
        "from dino_d2.tools.train_net import parse\n"
        "from dino_d2.engine import DINOTrainer\n"
        "class Poisoned(DINOTrainer):\n"
        "    @classmethod\n"
        "    def build_model(cls, cfg):\n"
        "        model = super().build_model(cfg)\n"
        "        poison = lambda module, inputs, levels: [level * float('nan') for level in levels]\n"
        "        model.neck.register_forward_hook(poison)\n"
        "        return model\n"
        "run.DINOTrainer = Poisoned\n"
        "run.train_or_evaluate(parse(sys.argv[1:]))\n"
    )
    values = config_values(four_pictures, tmp_path / "run", "logged")
    values += ["SOLVER.MAX_ITER", "1", "SOLVER.ON_NON_FINITE", "skip", "DATASETS.TEST", "()"]
    command = [sys.executable, str(script), "--config-file", str(RECIPE), *values]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    said = "the loss of iteration 0 is not finite"
    assert said in (tmp_path / "run" / "log.txt").read_text()
    assert said in result.stdout
