"""Nothing lost: exact resume after a kill, whole checkpoints, folders of other runs."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper

from dino_d2 import load_config
from dino_d2.checkpoint import files
from dino_d2.data import CocoFiles, build_train_augmentation, load_config_for_files, register_datasets
from dino_d2.data.loader import GroupedBatches, build_train_loader
from dino_d2.engine import DINOTrainer
from dino_d2.engine.run_folder import check_run_folder, record_data
from tests.synthetic import config_values, write_rectangles

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "dino_r50_4scale_12ep.yaml"
SMALL = ["INPUT.MIN_SIZE_TRAIN", "[48,64]", "INPUT.COLOR_JITTER", "0.3", "SOLVER.EMA.ENABLED", "True"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rectangles(tmp_path_factory.mktemp("resume"), count=6, size=64)


def train_net(data: tuple[Path, Path], output: Path, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    values = config_values(data, output, "resume_rectangles")
    return [sys.executable, "tools/train_net.py", "--config-file", str(RECIPE), *options, *values, *SMALL, *arguments]


def run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_killed_run_goes_on_bit_for_bit(data: tuple[Path, Path], tmp_path: Path) -> None:
    length = ("SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "(6,)", "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "0")
    whole = run(train_net(data, tmp_path / "whole", *length))
    assert whole.returncode == 0, whole.stderr[-3000:]

    killed = tmp_path / "killed"
    command = train_net(data, killed, *length, "DATALOADER.NUM_WORKERS", "1")
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (killed / "last_checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "last_checkpoint").read_text() == "model_0000002.pth"
    resumed = run(train_net(data, killed, *length, options=("--resume",)))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Starting training from iteration 3" in resumed.stdout

    ours, theirs = (torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("killed", "whole"))
    assert list(differing(ours, theirs)) == []


@pytest.mark.slow
def test_one_command_begins_a_run_and_goes_on_with_it(data: tuple[Path, Path], tmp_path: Path) -> None:
    """As a queue starts a job again and again, killed at any time: here before its first checkpoint."""
    command = train_net(data, tmp_path, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", options=("--resume",))
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "last_checkpoint").exists()
    begun = run(command)
    assert begun.returncode == 0, begun.stderr[-3000:]
    assert "Starting training from iteration 0" in begun.stdout
    again = run([*command, "SOLVER.MAX_ITER", "3"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Starting training from iteration 2" in again.stdout


def differing(ours: object, theirs: object, path: str = ""):
    """Paths in nested dicts and lists where two states are not the same."""
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            yield path
        for key in ours.keys() & theirs.keys():
            yield from differing(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, (list, tuple)):
        for i, (x, y) in enumerate(itertools.zip_longest(ours, theirs)):
            yield from differing(x, y, f"{path}.{i}")
    elif isinstance(ours, torch.Tensor):
        if not torch.equal(ours, theirs):
            yield path
    elif ours != theirs:
        yield path


def make_loader(data: tuple[Path, Path], workers: int, seed: int, first: int):
    cfg = load_config(str(RECIPE), config_values(data, Path("unused"), "resume_loader"))
    cfg.merge_from_list([*SMALL, "SEED", str(seed), "DATALOADER.NUM_WORKERS", str(workers)])
    register_datasets(cfg)
    loader = build_train_loader(cfg, DatasetMapper(cfg, True, augmentations=[build_train_augmentation(cfg)]))
    loader.first_batch = first
    return loader


def test_loader_goes_on_at_any_batch_with_any_number_of_workers(data: tuple[Path, Path]) -> None:
    batches = list(itertools.islice(make_loader(data, workers=0, seed=5, first=0), 8))
    later = list(itertools.islice(make_loader(data, workers=2, seed=5, first=4), 4))
    for expected, found in zip(batches[4:], later, strict=True):
        assert [x["image_id"] for x in found] == [x["image_id"] for x in expected]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(found, expected, strict=True))
    other = list(itertools.islice(make_loader(data, workers=0, seed=6, first=0), 8))
    assert any(
        not torch.equal(x["image"], y["image"]) if x["image"].shape == y["image"].shape else True
        for a, b in zip(batches, other, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def test_loading_in_this_process_leaves_its_random_numbers_alone(data: tuple[Path, Path]) -> None:
    batches = iter(make_loader(data, workers=0, seed=5, first=0))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(batches)
    assert torch.equal(torch.rand(3), expected)


def test_batches_hold_one_shape_and_every_sample_once() -> None:
    groups = [0, 1, 1, 0, 0, 1]
    batches = list(GroupedBatches(range(6), groups, batch_size=3, first=0))
    assert batches == [[(1, 1), (2, 2), (5, 5)], [(0, 0), (3, 3), (4, 4)]] or batches == [
        [(0, 0), (3, 3), (4, 4)],
        [(1, 1), (2, 2), (5, 5)],
    ]
    assert list(GroupedBatches(range(6), groups, batch_size=3, first=1)) == batches[1:]


def trainer_for(data: tuple[Path, Path], output: Path, *overrides: str) -> DINOTrainer:
    values = config_values(data, output, f"resume_{output.name}")
    cfg = load_config(str(RECIPE), [*values, *SMALL, "TEST.EVAL_PERIOD", "0", *overrides])
    register_datasets(cfg)
    return DINOTrainer(cfg)


def groups_by_name(trainer: DINOTrainer) -> dict[str, dict]:
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {names[p]: group for group in trainer.optimizer.param_groups for p in group["params"]}


def moments_by_name(trainer: DINOTrainer) -> dict[str, dict]:
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {names[p]: state for p, state in trainer.optimizer.state.items()}


LENGTH = ("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(1,)", "SOLVER.CHECKPOINT_PERIOD", "2", "DATASETS.TEST", "()")


def test_resumed_run_has_the_learning_rate_and_weight_decay_of_its_config(
    data: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights and norms decay alike in the recipe and no longer here, so the optimizer groups its parameters anew."""
    before = trainer_for(data, tmp_path, *LENGTH, "SOLVER.MAX_ITER", "2")
    before.train()
    changed = ("SOLVER.BASE_LR", "0.01", "SOLVER.WEIGHT_DECAY", "0.02", "SOLVER.BACKBONE_MULTIPLIER", "0.5")
    again = trainer_for(data, tmp_path, *LENGTH, *changed)
    logging.getLogger("dino_d2").propagate = True
    again.resume_or_load(resume=True)

    groups = groups_by_name(again)
    weight, norm = groups["decoder.layers.0.ffn.linear1.weight"], groups["decoder.norm.weight"]
    assert (weight["initial_lr"], weight["weight_decay"]) == (0.01, 0.02)
    assert weight["lr"] == pytest.approx(0.001)  # after the step of the schedule
    assert norm["weight_decay"] == 1e-4
    backbone = next(group for name, group in groups.items() if name.startswith("backbone."))
    assert (backbone["initial_lr"], backbone["lr"]) == (0.005, pytest.approx(0.0005))
    assert again.scheduler.base_lrs == [group["initial_lr"] for group in again.optimizer.param_groups]
    assert re.search(r"weight_decay of \d+ parameters was 0\.0001, is now 0\.02", caplog.text)
    assert list(differing(moments_by_name(again), moments_by_name(before))) == []

    again.train()
    assert weight["lr"] == pytest.approx(0.001)
    assert groups_by_name(again)["decoder.norm.weight"]["weight_decay"] == 1e-4


def test_checkpoint_without_parameter_names_is_resumed_with_the_same_groups(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    """As they were written before."""
    before = trainer_for(data, tmp_path, *LENGTH, "SOLVER.MAX_ITER", "2")
    before.train()
    path = tmp_path / "model_final.pth"
    content = torch.load(path, weights_only=True)
    for group in content["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(content, path)
    again = trainer_for(data, tmp_path, *LENGTH, "SOLVER.BASE_LR", "0.01")
    again.resume_or_load(resume=True)
    assert [group["lr"] for group in again.optimizer.param_groups] == [pytest.approx(0.001)]
    assert list(differing(moments_by_name(again), moments_by_name(before))) == []
    other = trainer_for(data, tmp_path, *LENGTH, "SOLVER.BACKBONE_MULTIPLIER", "0.5")
    with pytest.raises(ValueError, match=r"groups its parameters differently.*SOLVER\.BACKBONE_MULTIPLIER"):
        other.resume_or_load(resume=True)


def test_full_disk_leaves_what_was_there(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(data, tmp_path, "SOLVER.MAX_ITER", "1")
    trainer.checkpointer.save("model_0000000")
    before = (tmp_path / "model_0000000.pth").read_bytes()

    def no_space(content: dict, file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.torch, "save", no_space)
    with pytest.raises(OSError, match=r"could not write .*model_0000000\.pth .* MiB free .*No space left"):
        trainer.checkpointer.save("model_0000000")
    assert (tmp_path / "model_0000000.pth").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_truncated_checkpoint_is_reported_and_the_one_before_is_used_when_asked(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    trainer = trainer_for(data, tmp_path, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2")
    trainer.train()
    last = tmp_path / (tmp_path / "last_checkpoint").read_text()
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    again = trainer_for(data, tmp_path, "SOLVER.MAX_ITER", "4")
    with pytest.raises(ValueError, match=rf"{last.name} is damaged") as error:
        again.resume_or_load(resume=True)
    earlier = re.search(r"--resume-from (\S+)", str(error.value))[1]
    again.resume_from(earlier)
    assert Path(earlier).name == "model_0000003.pth"
    assert again.start_iter == 4


def test_folder_of_a_run_is_not_overwritten_and_not_mixed(data: tuple[Path, Path], tmp_path: Path) -> None:
    short = ("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()")
    assert run(train_net(data, tmp_path, *short)).returncode == 0
    held = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "log.txt"}

    again = run(train_net(data, tmp_path, *short))
    assert again.returncode != 0
    assert f"{tmp_path} already holds a run. Pass --resume to continue it" in again.stderr

    other = run(train_net(data, tmp_path, *short, "MODEL.DINO.NUM_QUERIES", "30", options=("--resume",)))
    assert other.returncode != 0
    assert "MODEL.DINO.NUM_QUERIES was 20, is now 30" in other.stderr

    fewer = write_rectangles(tmp_path / "fewer", count=4, size=64)
    other = run(train_net(fewer, tmp_path, *short, options=("--resume",)))
    assert other.returncode != 0
    assert "resume_rectangles had 6 images, has 4 now" in other.stderr

    evaluated = run(train_net(data, tmp_path, "TEST.DETECTIONS_PER_IMAGE", "7", options=("--eval-only", "--resume")))
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert "DETECTIONS_PER_IMAGE: 7" in (tmp_path / "inference" / "config.yaml").read_text()
    assert f"OUTPUT_DIR: {tmp_path}\n" in (tmp_path / "inference" / "config.yaml").read_text()
    assert "AP,AP50,AP75" in (tmp_path / "inference" / "log.txt").read_text()
    assert {path: path.read_bytes() for path in held} == held
    assert "iteration" in json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])


def config_of_files(annotations: Path, images: Path, output: Path) -> CfgNode:
    cfg = load_config_for_files(str(RECIPE), ["OUTPUT_DIR", str(output)], CocoFiles(annotations, images), None)
    register_datasets(cfg)
    return cfg


def test_a_run_goes_on_with_its_data_wherever_they_are_now(data: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    cfg = config_of_files(*data, output)
    check_run_folder(cfg, resume=True)
    record_data(cfg)
    (output / "last_checkpoint").write_text("model_0000009.pth")

    moved = shutil.copytree(data[0].parent, tmp_path / "moved")
    check_run_folder(config_of_files(moved / data[0].name, moved / data[1].name, output), resume=True)

    changed = moved / data[0].name
    changed.write_text(changed.read_text().replace('"bbox": [', '"bbox": [1', 1))
    with pytest.raises(ValueError, match=r"own_train has 6 images as before, but other annotations.*\n.*OUTPUT_DIR"):
        check_run_folder(config_of_files(changed, moved / data[1].name, output), resume=True)

    (output / "training_data.json").unlink()  # of a run that was begun before there was one
    check_run_folder(config_of_files(changed, moved / data[1].name, output), resume=True)


@pytest.mark.parametrize("name", ["model_best.pth", "model_0000009.pth", "model_final_ema.pth"])
def test_weights_of_a_run_that_was_ended_before_its_first_checkpoint_are_not_overwritten(
    tmp_path: Path, name: str
) -> None:
    cfg = load_config(str(RECIPE), ["OUTPUT_DIR", str(tmp_path / "run")])
    check_run_folder(cfg, resume=False)
    (tmp_path / "run" / name).touch()
    with pytest.raises(FileExistsError, match=rf"run holds {name} of another run.* or begin .*--resume"):
        check_run_folder(cfg, resume=False)
    check_run_folder(cfg, resume=True)  # the same command again


def test_going_on_from_weights_alone_is_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    first = trainer_for(data, tmp_path / "first", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    first.train()
    weights = str(tmp_path / "first" / "model_final_ema.pth")
    with pytest.raises(ValueError, match=rf"{weights} holds only weights.*MODEL\.WEIGHTS {weights}"):
        trainer_for(data, tmp_path / "second").resume_from(weights)


def test_resumed_run_that_is_killed_goes_on_from_the_same_checkpoint(data: tuple[Path, Path], tmp_path: Path) -> None:
    """A run that is killed before its next checkpoint does not return to what was abandoned."""
    trainer_for(data, tmp_path / "run", *LENGTH).train()
    earlier = str(tmp_path / "run" / "model_0000001.pth")
    for folder in ("run", "other"):
        trainer_for(data, tmp_path / folder, *LENGTH).resume_from(earlier)
        again = trainer_for(data, tmp_path / folder, *LENGTH)
        again.resume_or_load(resume=True)
        assert again.start_iter == 2
        ours, theirs = (
            torch.load(path, weights_only=True) for path in (again.checkpointer.get_checkpoint_file(), earlier)
        )
        assert list(differing(ours, theirs)) == []
    assert (tmp_path / "run" / "model_0000003.pth").exists()  # nothing is removed
    assert files_in(tmp_path / "other") == ["model_0000001.pth"]


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model_*.pth"))


def test_old_checkpoints_are_removed_also_those_of_before_resuming(data: tuple[Path, Path], tmp_path: Path) -> None:
    keep = ("SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.CHECKPOINT_KEEP", "2", "SOLVER.EMA.ENABLED", "False")
    keep += ("DATASETS.TEST", "()")
    trainer_for(data, tmp_path, "SOLVER.MAX_ITER", "3", *keep).train()
    assert files_in(tmp_path) == ["model_0000001.pth", "model_0000002.pth", "model_final.pth"]
    again = trainer_for(data, tmp_path, "SOLVER.MAX_ITER", "4", *keep)
    again.resume_or_load(resume=True)
    again.train()
    assert files_in(tmp_path) == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


def test_best_weights_are_kept_and_the_run_goes_on_from_its_last_checkpoint(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0: 10.0, 1: 30.0, 3: float("nan"), 5: 25.0, 6: 31.0}  # the last evaluation comes after the last step
    monkeypatch.setattr(
        DINOTrainer, "evaluate", lambda self: {"bbox": {"AP": -self.iter}, "ema": {"bbox": {"AP": scores[self.iter]}}}
    )
    settings = ("TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.BEST_METRIC", "ema/bbox/AP")

    def best(last_iteration: int) -> tuple[float, int]:
        values = config_values(data, tmp_path, f"resume_{tmp_path.name}")
        cfg = load_config(str(RECIPE), [*values, *SMALL, *settings, "SOLVER.MAX_ITER", str(last_iteration + 1)])
        register_datasets(cfg)
        trainer = DINOTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        content = torch.load(tmp_path / "model_best.pth", weights_only=True)
        assert content.keys() == {"model", "iteration", "ema/bbox/AP"}
        if content["iteration"] == last_iteration + 1:
            weight = trainer.ema.model.decoder.norm.weight
            assert torch.equal(content["model"]["decoder.norm.weight"], weight)
        assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
        return content["ema/bbox/AP"], content["iteration"]

    assert best(2) == (30.0, 1)
    assert best(4) == (30.0, 1)  # of the run before
    assert best(5) == (31.0, 6)


def test_best_of_an_average_that_is_not_there_is_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BEST_METRIC is ema/bbox/AP, which needs SOLVER\.EMA\.ENABLED True"):
        trainer_for(data, tmp_path, "SOLVER.BEST_METRIC", "ema/bbox/AP", "SOLVER.EMA.ENABLED", "False")
