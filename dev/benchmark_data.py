#!/usr/bin/env python3
"""Measure data loading: start-up time, memory per process and node, samples per second; prints Markdown.

    dev/benchmark_data.py --data coco
    dev/benchmark_data.py --data objects365 --share 0.25 --way dino_d2 --folder /large/disk

Generates a dataset of the real size: annotations like COCO's (7.3 objects per image, with polygons) or Objects365's
(14.7, only boxes), and eight images that all entries refer to. The processes correspond to those of a node with several
GPUs. "dino_d2" is `dino_d2.data.build_train_loader`, "detectron2" its `build_detection_train_loader`, both with the
recipe's augmentation. Linux only: memory is read from /proc.

Memory is PSS, where shared pages are divided among processes so that the sum is the node's memory, minus the memory
before loading. Steady memory is measured after reading every record once.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from detectron2.data import DatasetFromList, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader

from dino_d2 import load_config
from dino_d2.data import ImageMapper, TrainingLoader, build_train_augmentation, build_train_loader, register_datasets

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "dino_r50_4scale_12ep.yaml"
PHOTOGRAPHS, WIDTH, HEIGHT = 8, 640, 480
NAME = "generated"
MIB = 2**20
WAYS = DINO_D2, DETECTRON2 = "dino_d2", "detectron2"
BEFORE, START, STEADY, END, PEAK, NODE_PEAK = "before", "start", "steady", "end", "peak", "peak of the node"
COLUMNS = ("loader", "start (s)", "peak, process (MiB)", "peak, node", "steady, process", "steady, node")


@dataclass(frozen=True)
class Kind:
    """Size of a dataset."""

    images: int
    objects: float  # per image, on average
    corners: int  # per polygon; 0: only boxes
    classes: int


KINDS = {"coco": Kind(118_000, 7.3, 25, 80), "objects365": Kind(1_700_000, 14.7, 0, 365)}


@dataclass(frozen=True)
class Case:
    """A single measurement."""

    way: str  # dino_d2 | detectron2
    annotations: str
    images: str
    classes: int
    processes: int
    workers: tuple[int, ...]
    seconds: float  # of reading samples


def write_dataset(folder: Path, kind: Kind) -> tuple[Path, Path]:
    """Returns the annotation file and the image folder."""
    images = folder / "images"
    images.mkdir()
    for number in range(PHOTOGRAPHS):
        noise = Image.effect_noise((WIDTH // 8, HEIGHT // 8), 80).resize((WIDTH, HEIGHT)).convert("RGB")
        noise.save(images / f"{number}.jpg", quality=90)
    annotations = folder / "annotations.json"
    with annotations.open("w") as file:
        file.write('{"info": {}, "images": [')
        file.writelines(_joined(_images(kind)))
        file.write('], "annotations": [')
        file.writelines(_joined(_objects(kind)))
        categories = (f'{{"id": {i}, "name": "class {i}"}}' for i in range(1, kind.classes + 1))
        file.write(f'], "categories": [{", ".join(categories)}]}}')
    return annotations, images


def _joined(entries: Iterator[str]) -> Iterator[str]:
    yield next(entries)
    for entry in entries:
        yield ", " + entry


def _images(kind: Kind) -> Iterator[str]:
    url = "http://images.cocodataset.org/train2017/000000000000.jpg"
    for number in range(kind.images):
        yield (
            f'{{"license": 4, "file_name": "{number % PHOTOGRAPHS}.jpg", "coco_url": "{url}", "height": {HEIGHT}, '
            f'"width": {WIDTH}, "date_captured": "2013-11-17 05:57:24", "id": {number}}}'
        )


def _objects(kind: Kind) -> Iterator[str]:
    rng = np.random.default_rng(0)
    pool = [f"{x:.2f}" for x in rng.uniform(1, HEIGHT / 2, 9973)]  # a prime, so that combinations do not repeat
    total = round(kind.images * kind.objects)
    of_images = rng.integers(kind.images, size=total)
    of_classes = rng.integers(1, kind.classes + 1, size=total)
    numbers = itertools.cycle(pool)
    for number, (image, category) in enumerate(zip(of_images.tolist(), of_classes.tolist(), strict=True)):
        polygon = ", ".join(itertools.islice(numbers, 2 * kind.corners))
        segmentation = f'"segmentation": [[{polygon}]], ' if kind.corners else ""
        box = ", ".join(itertools.islice(numbers, 4))
        yield (
            f'{{{segmentation}"area": {next(numbers)}, "iscrowd": 0, "image_id": {image}, "bbox": [{box}], '
            f'"category_id": {category}, "id": {number}}}'
        )


def pss(process: int | str = "self") -> float:
    """PSS in MiB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def build(case: Case) -> tuple[Sequence[dict], DataLoader | TrainingLoader, Iterable[list]]:
    """The records, the loader whose number of workers can be set, and the batches."""
    cfg = load_config(str(RECIPE), ["MODEL.DEVICE", "cpu", "MODEL.DINO.NUM_CLASSES", str(case.classes)])
    cfg.merge_from_list(["DATASETS.TRAIN", [NAME], "DATASETS.TEST", [], "SEED", 1, "DATALOADER.NUM_WORKERS", 1])
    cfg.SOLVER.IMS_PER_BATCH = case.processes
    mapper = ImageMapper(cfg, is_train=True, augmentations=[build_train_augmentation(cfg)])
    if case.way == DINO_D2:
        cfg.DATASETS.COCO_FORMAT = [[NAME, case.annotations, case.images]]
        register_datasets(cfg)
        loader = build_train_loader(cfg, mapper)
        return loader.records, loader, loader
    register_coco_instances(NAME, {}, case.annotations, case.images)
    records = DatasetFromList(get_detection_dataset_dicts([NAME], cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS), copy=False)
    batches = build_detection_train_loader(records, mapper=mapper, total_batch_size=case.processes, num_workers=1)
    return records, batches.dataset, batches


def in_process(rank: int, case: Case, meeting: str, results: multiprocessing.SimpleQueue) -> None:
    """Main function of each process; the first also reads samples."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=case.processes)
    comm.create_local_process_group(case.processes)
    dist.barrier()
    before = pss()
    results.put((rank, BEFORE, before))
    dist.barrier()
    start = time.perf_counter()
    records, loader, batches = build(case)
    dist.barrier()
    results.put((rank, START, time.perf_counter() - start))
    for index in range(len(records)):
        records[index]
    dist.barrier()  # all processes have read everything: pages are shared as in steady state
    gc.collect()
    results.put((rank, STEADY, pss() - before))
    dist.barrier()
    if rank == 0:
        for workers in case.workers:
            loader.num_workers = workers
            results.put((rank, f"{workers} workers", samples_per_second(batches, case.seconds)))
    dist.barrier()
    results.put((rank, END, 0.0))
    dist.destroy_process_group()


def samples_per_second(batches: Iterable[list], seconds: float) -> float:
    """Throughput of endless batches, after the workers have started."""
    iterator = iter(batches)
    for _ in range(16):
        next(iterator)
    start, samples = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        samples += len(next(iterator))
    return samples / (time.perf_counter() - start)


def measure(case: Case) -> list[dict[str, float]]:
    """Measurements of each process by name; "peak" is per process, "peak of the node" for all together."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    found: list[dict[str, float]] = [{PEAK: 0.0} for _ in range(case.processes)]
    node_peak = 0.0
    with tempfile.TemporaryDirectory() as folder:
        arguments = (case, str(Path(folder, "meeting")), results)
        processes = [context.Process(target=in_process, args=(rank, *arguments)) for rank in range(case.processes)]
        for process in processes:
            process.start()
        while any(END not in each for each in found):
            time.sleep(0.1)
            while not results.empty():
                rank, name, value = results.get()
                found[rank][name] = value
            if failed := [process.exitcode for process in processes if process.exitcode]:
                for process in processes:
                    process.terminate()
                sys.exit(f"benchmark_data.py: a process of {case.way} ended with {failed[0]} (-9: out of memory)")
            if all(BEFORE in each for each in found) and not any(STEADY in each for each in found):
                now = [max(pss(p.pid) - each[BEFORE], 0.0) for p, each in zip(processes, found, strict=True)]
                for each, value in zip(found, now, strict=True):
                    each[PEAK] = max(each[PEAK], value)
                node_peak = max(node_peak, sum(now))
        for process in processes:
            process.join()
    for each in found:
        each[NODE_PEAK] = node_peak
    return found


def as_row(case: Case, found: Sequence[dict[str, float]]) -> list[str]:
    steady = [each[STEADY] for each in found]
    memory = [max(each[PEAK] for each in found), found[0][NODE_PEAK], max(steady), sum(steady)]
    rates = [f"{found[0][f'{workers} workers']:.1f}" for workers in case.workers]
    return [case.way, f"{max(each[START] for each in found):.1f}", *(f"{value:,.0f}" for value in memory), *rates]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=KINDS, default="coco", help="dataset to imitate (default coco)")
    parser.add_argument("--images", type=int, help="number (default: as in the dataset)")
    parser.add_argument("--share", type=float, default=1.0, help="fraction of images to use")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help="default: both")
    parser.add_argument("--processes", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[1, 2, 8], help="workers for reading samples (default 1 2 8)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of reading samples (default 20)")
    parser.add_argument("--folder", type=Path, help="for the dataset, up to 3.5 GB; default: a temporary one")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    kind = KINDS[args.data]
    kind = replace(kind, images=round((args.images or kind.images) * args.share))
    with tempfile.TemporaryDirectory(prefix="benchmark_data_", dir=args.folder) as folder:
        annotations, images = write_dataset(Path(folder), kind)
        size = annotations.stat().st_size / MIB
        print(
            f"{kind.images:,} images like {args.data}'s, annotations of {size:,.0f} MiB; {args.processes} processes\n"
        )
        rows = []
        for way in args.way:
            shape = (str(annotations), str(images), kind.classes, args.processes, tuple(args.workers), args.seconds)
            case = Case(way, *shape)
            rows.append(as_row(case, measure(case)))
    rates = [f"samples/s, {workers} workers" for workers in args.workers]
    print(tabulate(rows, [*COLUMNS, *rates], tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
