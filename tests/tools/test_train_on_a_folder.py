"""`dino-d2 train --data FOLDER`, from photographs to a detector."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dino_d2 import Detector
from dino_d2.checkpoint import Assumptions
from tests.engine.test_resume import differing
from tests.synthetic import COLOURS, config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "dino_r50_4scale_12ep"
CHOSEN = (  # by the command
    "MODEL.DINO.NUM_CLASSES", "DATASETS.COCO_FORMAT", "DATASETS.TRAIN", "DATASETS.TEST", "OUTPUT_DIR",
    "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD",
)  # fmt: skip


def yolo_of(folder: Path, photographs: int, part: str) -> None:
    """A part in Roboflow's layout; its last image has no label file."""
    annotations, images = write_rectangles(folder / "rectangles" / part, photographs, size=64, empty=1)
    content = json.loads(annotations.read_text())
    labels = folder / part / "labels"
    labels.mkdir(parents=True)
    images.rename(folder / part / "images")
    for entry in content["annotations"]:
        x, y, width, height = (side / 64 for side in entry["bbox"])
        with (labels / f"{entry['image_id']}.txt").open("a") as file:
            file.write(f"{entry['category_id'] - 1} {x + width / 2} {y + height / 2} {width} {height}\n")


def small(output: Path) -> list[str]:
    """KEY VALUE: what makes the model tiny."""
    values = config_values((output, output), output, "unused")
    pairs = zip(values[::2], values[1::2], strict=True)
    return [part for pair in pairs if pair[0] not in CHOSEN for part in pair]


def run(*command: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("train_on_a_folder")
    data, output = folder / "pets", folder / "out"
    yolo_of(data, 5, "train")
    yolo_of(data, 7, "valid")
    names = {"names": list(COLOURS), "train": "../train/images", "val": "../valid/images", "test": "../test/images"}
    (data / "data.yaml").write_text(yaml.safe_dump(names))
    options = ("--data", data, "--config-file", RECIPE, "--epochs", 2, "--output", output)
    result = run("-m", "dino_d2", "train", *options, *small(output), "INPUT.MIN_SIZE_TRAIN", "(64,)")
    assert result.returncode == 0, result.stderr[-3000:]
    return output, result


def test_it_says_what_it_found_and_chose(trained: tuple[Path, subprocess.CompletedProcess]) -> None:
    printed = trained[1].stdout
    assert "YOLO, 5 images to train on, 7 to evaluate on" in printed
    assert "SOLVER.MAX_ITER 6  # 2 epochs of 3: 5 images, 2 per step" in printed
    assert "SOLVER.BASE_LR" not in printed.split("Rank of current process")[0]  # the command's own


def test_it_ends_with_a_report_of_the_best_weights(
    trained: tuple[Path, subprocess.CompletedProcess],
) -> None:
    output, result = trained
    assert f"{output}/report/index.html" in result.stdout
    numbers = json.loads((output / "report" / "report.json").read_text())
    recorded = json.loads((output / "inference" / "results.json").read_text())
    assert numbers["metrics"]["AP"]["value"] == pytest.approx(recorded["metrics"]["bbox"]["AP"] or 0)
    assert numbers["about"]["weights"] == recorded["weights"]
    assert "total_loss" in (output / "report" / "index.html").read_text()  # curves


def test_it_ends_with_ap_by_class_examples_and_the_next_command(
    trained: tuple[Path, subprocess.CompletedProcess],
) -> None:
    output, result = trained
    end = result.stdout[result.stdout.index("AP on the 7 images of") :]
    rows = [line.split()[0] for line in end.splitlines()[3:6]]
    assert rows == [*COLOURS, "all"]
    assert f"Next: dino-d2 predict --weights {output} --input PHOTO" in end
    pictures = sorted(path.name for path in (output / "examples").iterdir())
    assert pictures == [f"{what}_{number}.png" for what in ("best", "worst") for number in (1, 2, 3)]
    assert (output / "model_best.pth").is_file()
    best = torch.load(output / "model_best.pth", weights_only=True)["model"]
    threshold = Assumptions.from_tensor(best["_extra_state"]).score_threshold
    assert f"ground truth beside detections above {0.3 if threshold is None else threshold:.3f}" in end


def test_its_config_alone_makes_the_same_run(trained: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> None:
    output = trained[0]
    command = ("tools/train_net.py", "--config-file", output / "config.yaml")
    again = run(*command, "OUTPUT_DIR", tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    ours, theirs = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (tmp_path, output))
    assert list(differing(ours, theirs)) == []
    assert (tmp_path / "examples" / "worst_1.png").is_file()
    resumed = run(*command, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Starting training from iteration 6" in resumed.stdout


def test_what_comes_next_finds_objects(trained: tuple[Path, subprocess.CompletedProcess], tmp_path: Path) -> None:
    photograph = trained[0].parent / "pets" / "valid" / "images" / "1.png"
    result = run("-m", "dino_d2", "predict", "--weights", trained[0], "--input", photograph, "--output", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "1.png").is_file()
    assert f"score threshold: {Detector.from_pretrained(trained[0]).explain_threshold()}" in result.stdout


def test_a_model_is_evaluated_without_the_data_it_was_trained_with(
    trained: tuple[Path, subprocess.CompletedProcess], tmp_path: Path
) -> None:
    """On another machine."""
    shutil.copytree(trained[0], tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained[0].parent), "elsewhere"))
    data = trained[0].parent / "pets"
    result = run("-m", "dino_d2", "evaluate", "--weights", config.parent, "--data", data, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    recorded, before = (
        json.loads((folder / "inference" / "results.json").read_text()) for folder in (tmp_path / "out", trained[0])
    )
    assert recorded["metrics"] == before["metrics"]


def test_a_folder_of_something_else_is_an_error_of_the_user(tmp_path: Path) -> None:
    result = run("-m", "dino_d2", "train", "--data", tmp_path, "--config-file", RECIPE)
    assert result.returncode == 2
    assert "has none of the supported layouts" in result.stderr
    assert "Traceback" not in result.stderr
