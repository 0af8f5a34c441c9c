"""The training loader: detectron2's parts, put together so that it can go on at any batch.

What a batch holds depends on the seed and on its number alone, not on how many workers load it or what was drawn
before. Grouping by shape is done on indices, so that going on at batch n loads none of the n pictures before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from dino_d2.randomness import own_random_numbers

DATA = 0  # first number of the keys of the random numbers that augmentation draws


class SeededSamples(Dataset):
    """Samples by (place in the stream, index), mapped with random numbers of their own."""

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict], key: tuple[int, ...]):
        self.records, self.mapper, self.key = records, mapper, key

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place_and_index: tuple[int, int]) -> dict[str, Any]:
        place, index = place_and_index
        with own_random_numbers(*self.key, place):
            return self.mapper(self.records[index])


class GroupedBatches:
    """Endless batches of (place in the stream, index), from batch number `first` on.

    Args:
        indices: of the samples of this process, endless.
        groups: of each sample; only samples of one group meet in a batch.
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

    `seed` and `first_batch`, the number of the batch that iteration begins with, may be set until then.
    """

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[[dict], dict],
        indices: Callable[[int], Iterable[int]],
        batch_size: int,
        group_by_shape: bool,
        num_workers: int,
        seed: int,
    ):
        """
        Args:
            records: detectron2's dataset dicts, with "width" and "height".
            indices: from a seed to the endless stream of this process.
            batch_size: of this process.
            group_by_shape: wide pictures with wide ones, tall with tall.
        """
        self.records = DatasetFromList(records, copy=False)
        self.groups = [int(group_by_shape and record["width"] > record["height"]) for record in records]
        self.mapper, self.indices = mapper, indices
        self.batch_size, self.num_workers = batch_size, num_workers
        self.seed, self.first_batch = seed, 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        loader = DataLoader(
            SeededSamples(self.records, self.mapper, (self.seed, DATA, comm.get_rank())),
            batch_sampler=GroupedBatches(self.indices(self.seed), self.groups, self.batch_size, self.first_batch),
            num_workers=self.num_workers,
            collate_fn=list,
            worker_init_fn=worker_init_reset_seed,
        )
        return iter(loader)


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict]) -> TrainingLoader:
    """As detectron2's `build_detection_train_loader`.

    Raises:
        ValueError: the batch cannot be shared among the processes, or the sampler is one that cannot resume.
    """
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {processes} processes cannot share evenly"
        )
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, min_keypoints=0
    )

    def indices(seed: int) -> Iterable[int]:
        if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
            return TrainingSampler(len(records), seed=seed)
        repeats = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(repeats, seed=seed)

    if cfg.DATALOADER.SAMPLER_TRAIN not in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}; "
            "it must be TrainingSampler or RepeatFactorTrainingSampler"
        )
    return TrainingLoader(
        records,
        mapper,
        indices,
        cfg.SOLVER.IMS_PER_BATCH // processes,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        cfg.DATALOADER.NUM_WORKERS,
        cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )
