"""The training loader: images that cannot be read, and the mapper that users bring."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from PIL import Image

from dino_d2 import load_config
from dino_d2.data import ImageMapper, TrainingLoader, build_train_augmentation, build_train_loader, register_datasets
from dino_d2.data.loader import share_of_batch
from dino_d2.engine import DINOTrainer
from tests.synthetic import config_values, write_rectangles

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml")
COUNT = 12
CUT = (2, 5)  # ids of images


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """JPEGs, the first half of them wide and the others tall, two of them cut off."""
    annotations, images = write_rectangles(tmp_path_factory.mktemp("loader"), COUNT, size=64)
    content = json.loads(annotations.read_text())
    for image in content["images"]:
        size = (80, 64) if image["id"] <= COUNT // 2 else (64, 80)
        picture = Image.open(images / image["file_name"]).resize(size)
        image |= {"file_name": f"{image['id']}.jpg", "width": size[0], "height": size[1]}
        picture.save(images / image["file_name"], quality=95)
        if image["id"] in CUT:
            cut_off(images / image["file_name"])
    annotations.write_text(json.dumps(content))
    return annotations, images


def config(data: tuple[Path, Path], *overrides: str) -> CfgNode:
    values = config_values(data, Path("unused"), f"loader_{data[0].parent}")
    small = ["INPUT.MIN_SIZE_TRAIN", "[48,64]", "INPUT.COLOR_JITTER", "0.3"]
    cfg = load_config(RECIPE, [*values, *small, *overrides])
    register_datasets(cfg)
    return cfg


def make_loader(cfg: CfgNode) -> TrainingLoader:
    return build_train_loader(cfg, ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)]))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_cut_off_picture_stops_training_by_name(data: tuple[Path, Path], workers: str) -> None:
    loader = make_loader(config(data, "DATALOADER.NUM_WORKERS", workers))
    with pytest.raises(ValueError, match=r"[25]\.jpg cannot be read as an image: .*truncated"):
        list(itertools.islice(loader, COUNT))


def test_replacement_depends_on_seed_and_place_alone(data: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    skip = ("INPUT.ON_UNREADABLE", "skip")
    with caplog.at_level(logging.WARNING, "dino_d2"), EventStorage() as storage:
        loader = make_loader(config(data, *skip))
        batches = list(itertools.islice(loader, 15))
        counted = storage.latest()["unreadable_images"][0]
    ids = [[sample["image_id"] for sample in batch] for batch in batches]
    assert not set(CUT) & set(itertools.chain(*ids))
    wide = [{image_id <= COUNT // 2 for image_id in batch} for batch in ids]
    assert all(len(shapes) == 1 for shapes in wide)  # one shape to a batch, also with replacements
    assert {frozenset(shapes) for shapes in wide} == {frozenset({True}), frozenset({False})}
    named = [re.search(r"(\d)\.jpg cannot be read", message)[1] for message in caplog.messages]
    assert {int(number) for number in named} == set(CUT)
    assert counted == loader.unreadable == len(named) >= 2

    for workers, first in (("2", 4), ("0", 9)):
        later = make_loader(config(data, *skip, "DATALOADER.NUM_WORKERS", workers))
        later.first_batch = first
        for expected, found in zip(batches[first:], later, strict=False):
            assert [x["image_id"] for x in found] == [x["image_id"] for x in expected]
            assert all(torch.equal(x["image"], y["image"]) for x, y in zip(found, expected, strict=True))
        if workers == "2":
            with EventStorage() as storage:  # counted in this process, read in others
                list(itertools.islice(later, 15))
                assert storage.latest()["unreadable_images"][0] == later.unreadable >= 1


def test_other_samples_are_what_they_were(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Skipping changes nothing but the samples of unreadable images."""
    sound = write_rectangles(tmp_path / "sound", 6, size=64)
    stop, skip = (make_loader(config(sound, "INPUT.ON_UNREADABLE", choice)) for choice in ("stop", "skip"))
    before = list(itertools.islice(stop, 6))
    cut_off(sound[1] / "3.png")
    changed = 0
    for expected, found in zip(itertools.chain(*before), itertools.chain(*itertools.islice(skip, 6)), strict=True):
        if expected["image_id"] == 3:
            changed += 1
            assert found["image_id"] != 3
        else:
            assert found["image_id"] == expected["image_id"]
            assert torch.equal(found["image"], expected["image"])
    assert changed == 2


def test_folder_of_unreadable_pictures_ends_training(tmp_path: Path) -> None:
    ruined = write_rectangles(tmp_path / "ruined", 3, size=64)
    for picture in ruined[1].iterdir():
        cut_off(picture)
    with pytest.raises(ValueError, match=r"10 images in a row cannot be read:(\n.*\d\.png.*){10}$"):
        next(iter(make_loader(config(ruined, "INPUT.ON_UNREADABLE", "skip"))))


def test_missing_pictures_are_skipped_too(tmp_path: Path) -> None:
    gone = write_rectangles(tmp_path / "gone", 2, size=64)
    (gone[1] / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        list(itertools.islice(make_loader(config(gone)), 2))
    loader = make_loader(config(gone, "INPUT.ON_UNREADABLE", "skip"))
    assert {sample["image_id"] for batch in itertools.islice(loader, 4) for sample in batch} == {2}
    assert loader.unreadable >= 4  # a replacement may be the same image again


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["INPUT.ON_UNREADABLE", "ignore"], "INPUT.ON_UNREADABLE is 'ignore'; it must be stop or skip"),
        (["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"], "must be TrainingSampler or RepeatFactor"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["SOLVER.IMS_PER_BATCH", "0"], r"SOLVER\.IMS_PER_BATCH is 0; it must be at least 1$"),
        (["SOLVER.IMS_PER_BATCH", "-2"], r"SOLVER\.IMS_PER_BATCH is -2; it must be at least 1$"),
    ],
)
def test_what_cannot_be_done_is_refused(data: tuple[Path, Path], override: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(config(data, *override))


@pytest.mark.parametrize("batch", [0, 2, 6])
def test_batch_that_cannot_be_divided_among_the_processes_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match=rf"IMS_PER_BATCH is {batch}; .* each of the 4 processes, such as [48]$"):
        share_of_batch(batch, 4)
    assert share_of_batch(8, 4) == 2


@pytest.mark.parametrize("reference", ["8", "-1"])
def test_batch_that_cannot_be_scaled_to_the_processes_is_refused(data: tuple[Path, Path], reference: str) -> None:
    with pytest.raises(ValueError, match=rf"REFERENCE_WORLD_SIZE is {reference}; .* divide SOLVER\.IMS_PER_BATCH, 2"):
        DINOTrainer(config(data, "SOLVER.REFERENCE_WORLD_SIZE", reference))


def test_trainer_with_a_mapper_of_the_users_own(tmp_path: Path) -> None:
    """As docs/data.md shows it."""
    seen = []

    class Mapper(ImageMapper):
        def __call__(self, dataset_dict: dict) -> dict:
            seen.append(dataset_dict["image_id"])
            return super().__call__(dataset_dict)

    class Trainer(DINOTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> TrainingLoader:
            return build_train_loader(cfg, Mapper(cfg, True, augmentations=[build_train_augmentation(cfg)]))

    cfg = config(write_rectangles(tmp_path / "own", 2, size=64), "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = Trainer(cfg)
    trainer.train()
    assert sorted(seen) == [1, 2]


def test_rare_classes_are_repeated_as_detectron2_does(data: tuple[Path, Path], tmp_path: Path) -> None:
    sound = write_rectangles(tmp_path / "sound", 6, size=64)
    repeat = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", "1.0")
    loader = make_loader(config(sound, *repeat))
    expected = itertools.islice(loader.indices(1), 12)
    found = [sample["image_id"] - 1 for batch in itertools.islice(loader, 6) for sample in batch]
    assert found == list(expected)
    assert np.ptp(np.bincount(found)) >= 1
