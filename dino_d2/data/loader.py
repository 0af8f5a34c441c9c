"""A training loader built from detectron2's parts that can resume at any batch.

A batch depends only on the seed and its number, not on the number of workers or on earlier random draws. Images are
grouped by shape from indices alone, so that resuming at batch n loads none of the images before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch.utils.data import DataLoader, Dataset

from dino_d2.randomness import own_random_numbers

from .datasets import check_classes
from .images import UnreadableImage
from .mosaic import draw_others
from .records import SharedRecords, load_records

DATA = 0  # first key of the random numbers for augmentation
MOST_UNREADABLE = 10  # images in a row before training stops

logger = logging.getLogger(__name__)


class SeededSamples(Dataset):
    """Samples by (position in the stream, index), each mapped with its own random numbers.

    Each comes with messages about unreadable images that it replaces. A replacement is of the same group and depends
    only on the key and the position.
    """

    def __init__(
        self,
        records: Sequence[dict],
        groups: np.ndarray,
        mapper: Callable[[dict], dict],
        key: tuple[int, ...],
        skip_unreadable: bool,
        mosaics: float,
    ):
        self.records, self.groups, self.mapper, self.key = records, groups, mapper, key
        self.skip_unreadable, self.mosaics = skip_unreadable, mosaics

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place_and_index: tuple[int, int]) -> tuple[dict[str, Any], list[str]]:
        place, index = place_and_index
        complaints: list[str] = []
        with own_random_numbers(*self.key, place):
            while True:
                try:
                    others = draw_others(self.records, self.mosaics)
                    return self.mapper(self.records[index], *([others] if others else [])), complaints
                except (UnreadableImage, FileNotFoundError) as error:
                    if not self.skip_unreadable:
                        raise
                    complaints.append(str(error))
                    if len(complaints) == MOST_UNREADABLE:
                        raise ValueError(
                            f"{MOST_UNREADABLE} images in a row cannot be read:\n" + "\n".join(complaints)
                        ) from error
                index = int(np.random.choice(np.flatnonzero(self.groups == self.groups[index])))


class GroupedBatches:
    """Endless batches of (position in the stream, index), starting with batch number `first`.

    Args:
        indices: endless sample indices of this process.
        groups: group of each sample; a batch holds samples of one group.
    """

    def __init__(self, indices: Iterable[int], groups: Sequence[int], batch_size: int, first: int):
        self.indices, self.groups, self.batch_size, self.first = indices, groups, batch_size, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        made = 0
        for place, index in enumerate(self.indices):
            batch = waiting.setdefault(self.groups[index], [])
            batch.append((place, index))
            if len(batch) == self.batch_size:
                if made >= self.first:
                    yield list(batch)
                made += 1
                batch.clear()


class TrainingLoader:
    """Endless batches (lists of mapped samples) for this process.

    `seed` and `first_batch`, the number of the first batch, can be set before iterating. Skipped unreadable images are
    logged, and counted in `unreadable` and in detectron2's `EventStorage`.
    """

    def __init__(
        self,
        records: SharedRecords,
        mapper: Callable[[dict], dict],
        indices: Callable[[int], Iterable[int]],
        batch_size: int,
        group_by_shape: bool,
        num_workers: int,
        seed: int,
        skip_unreadable: bool,
        mosaics: float,
    ):
        """
        Args:
            indices: from a seed to the endless stream of this process.
            batch_size: of this process.
            group_by_shape: wide images with wide ones, tall with tall.
            skip_unreadable: replace images that cannot be read by others.
            mosaics: fraction of samples that are mosaics; not 0: the mapper takes other records, too, as `ImageMapper`.
        """
        self.records, self.mapper, self.indices = records, mapper, indices
        self.groups = records.wide if group_by_shape else np.zeros(len(records), dtype=bool)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed, self.first_batch = seed, 0
        self.skip_unreadable, self.unreadable = skip_unreadable, 0
        self.mosaics = mosaics

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        key = (self.seed, DATA, comm.get_rank())
        loader = DataLoader(
            SeededSamples(self.records, self.groups, self.mapper, key, self.skip_unreadable, self.mosaics),
            batch_sampler=GroupedBatches(self.indices(self.seed), self.groups, self.batch_size, self.first_batch),
            num_workers=self.num_workers,
            collate_fn=list,
            worker_init_fn=worker_init_reset_seed,
        )
        return map(self._count_unreadable, iter(loader))

    def _count_unreadable(self, batch: list[tuple[dict[str, Any], list[str]]]) -> list[dict[str, Any]]:
        errors = [error for _, of_sample in batch for error in of_sample]
        for error in errors:
            self.unreadable += 1
            logger.warning(f"{error}; using another image instead ({self.unreadable} so far)")
        if errors and has_event_storage():
            get_event_storage().put_scalar("unreadable_images", self.unreadable, smoothing_hint=False)
        return [sample for sample, _ in batch]


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict]) -> TrainingLoader:
    """Like detectron2's `build_detection_train_loader`, but resumes exactly. All processes must call it.

    Args:
        cfg: its datasets must be registered.
        mapper: maps a record in detectron2's format to a model input, like `ImageMapper`, with random numbers from
            Python, NumPy or PyTorch. With `INPUT.ON_UNREADABLE: skip` an image is replaced by another if it raises
            `UnreadableImage` or `FileNotFoundError`, as `read_image` does. With `INPUT.MOSAIC` it is also called with a
            list of other records, for a mosaic.

    Raises:
        ValueError: the batch cannot be divided among the processes, the sampler cannot resume, the classes of a
            dataset and the config differ, or there is no training data.
    """
    batch_size = share_of_batch(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    samplers = ("TrainingSampler", "RepeatFactorTrainingSampler")
    _check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, samplers)
    _check_choice("INPUT.ON_UNREADABLE", cfg.INPUT.ON_UNREADABLE, ("stop", "skip"))
    if not 0 <= cfg.INPUT.MOSAIC <= 1:
        raise ValueError(f"INPUT.MOSAIC is {cfg.INPUT.MOSAIC}; it must be a fraction of the images, from 0 to 1")
    if cfg.INPUT.MOSAIC and not _takes_others(mapper):
        raise ValueError(
            f"INPUT.MOSAIC is {cfg.INPUT.MOSAIC}, but {mapper!r} takes one record only. Let it take a list of other "
            "records, too, as ImageMapper does, or set INPUT.MOSAIC to 0"
        )
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")
    check_classes(cfg, cfg.DATASETS.TEST)  # before training for hours
    records = load_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, needs_annotations=True)
    check_classes(cfg, cfg.DATASETS.TRAIN)

    def indices(seed: int) -> Iterable[int]:
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            return TrainingSampler(len(records), seed=seed)
        repeats = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(repeats, seed=seed)

    return TrainingLoader(
        records,
        mapper,
        indices,
        batch_size,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        cfg.DATALOADER.NUM_WORKERS,
        cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        cfg.INPUT.ON_UNREADABLE == "skip",
        cfg.INPUT.MOSAIC,
    )


def share_of_batch(images: int, processes: int) -> int:
    """Number of images of each process in a batch of `SOLVER.IMS_PER_BATCH`.

    Raises:
        ValueError: it is not the same whole number, at least 1, for each.
    """
    if images < 1 or images % processes:
        possible = max(-(-images // processes), 1) * processes
        rule = f"the same number for each of the {processes} processes, such as {possible}"
        raise ValueError(f"SOLVER.IMS_PER_BATCH is {images}; it must be {rule if processes > 1 else 'at least 1'}")
    return images // processes


def build_test_loader(cfg: CfgNode, dataset_name: str, mapper: Callable[[dict], dict]) -> DataLoader:
    """Like detectron2's `build_detection_test_loader`. All processes must call it.

    Raises:
        ValueError: the classes of the dataset and the config differ.
    """
    records = load_records([dataset_name], filter_empty=False, needs_annotations=False)
    check_classes(cfg, [dataset_name])
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)


def _takes_others(mapper: Callable[..., dict]) -> bool:
    try:
        signature(mapper).bind({}, [])
    except TypeError:
        return False
    return True


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; it must be {' or '.join(choices)}")
