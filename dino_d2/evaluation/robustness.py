"""AP on corrupted images and at other sizes, one evaluation ("cell") after the other or several at a time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import multiprocessing
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, convert_PIL_to_numpy
from detectron2.evaluation import inference_on_dataset
from PIL import Image
from torch import nn

from dino_d2.config import flat
from dino_d2.data import ImageMapper, build_test_augmentation, build_test_loader, read_image, register_datasets
from dino_d2.detector import Detector
from dino_d2.digest import sha256_of

from .build import build_evaluator
from .corruption_sheet import draw_corruptions
from .corruptions import STRENGTHS, check_corruption, corrupt
from .robustness_folder import CLEAN, SHEET, Cell, check_folder, read_cells, write_cell, write_result
from .settings import APSettings

STRENGTH_OF_SHEET = 3
SIZES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
MATTERS = ("MODEL.", "INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "TEST.")  # for AP
INDIFFERENT = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.TRUST_WEIGHTS", "TEST.EVAL_PERIOD", "TEST.EXPECTED_RESULTS")


@dataclass(frozen=True)
class Source:
    """What is evaluated: arguments of :meth:`Detector.from_pretrained`, and the name of a data set; empty: the first of
    `DATASETS.TEST`."""

    weights: str
    config_file: str | None
    overrides: tuple[Any, ...] = ()
    dataset: str = ""


class Evaluation:
    """A loaded model and its test set.

    Raises:
        OSError, ValueError: see :meth:`Detector.from_pretrained`; there is no data set.
    """

    def __init__(self, source: Source):
        detector = Detector.from_pretrained(source.weights, source.config_file, overrides=source.overrides)
        self.cfg, self.model = detector.cfg, detector.model
        self.dataset = source.dataset or next(iter(self.cfg.DATASETS.TEST), "")
        register_datasets(self.cfg, [self.dataset])
        if self.dataset not in MetadataCatalog.list():
            raise ValueError(
                f"the data set {self.dataset!r} is not known: name one in DATASETS.TEST or DATASETS.COCO_FORMAT"
                if self.dataset
                else "DATASETS.TEST is empty: name a data set to evaluate on"
            )

    def __call__(self, cell: Cell) -> float:
        """AP of a cell, in percent; 0 if nothing is found.

        Raises:
            ValueError: the data set has no annotations.
        """
        cfg = resized(self.cfg, cell.size)
        loader = build_test_loader(cfg, self.dataset, CorruptedImages(cfg, cell))
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            evaluator = build_evaluator(self.dataset, APSettings.of_config(cfg), folder)
            results = inference_on_dataset(self.model, loader, evaluator)
        ap = results.get("bbox", {}).get("AP", math.nan)
        if cell == CLEAN and math.isnan(ap):
            raise ValueError(f"AP is not defined: {self.dataset} has no annotated objects, or nothing is found in it")
        return 0.0 if math.isnan(ap) else float(ap)

    def draw_first_image(self) -> Image.Image:
        """The first image of the test set under every corruption."""
        record = next(iter(DatasetCatalog.get(self.dataset)))
        return draw_corruptions(read_image(record["file_name"], "RGB"), STRENGTH_OF_SHEET)

    def settings(self) -> dict[str, Any]:
        """What AP depends on: digests of the weights and the annotations, and config values by key."""
        values = flat(yaml.safe_load(self.cfg.dump()))
        annotations = MetadataCatalog.get(self.dataset).get("json_file")
        return {
            "data set": self.dataset,
            "annotations": sha256_of(annotations) if annotations else "",
            "weights": digest_of_weights(self.model),
        } | {key: value for key, value in values.items() if key.startswith(MATTERS) and key not in INDIFFERENT}


class CorruptedImages(ImageMapper):
    """The mapper of an evaluation that corrupts the images of a cell before they are resized.

    The corruption of an image depends only on its id: every model sees the same.
    """

    def __init__(self, cfg: CfgNode, cell: Cell):
        super().__init__(cfg, is_train=False, augmentations=[build_test_augmentation(cfg)])
        self.cell = cell

    def read(self, record: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
        pixels, size = super().read(record)
        if not self.cell.corruption:
            return pixels, size
        rgb = convert_image_to_rgb(pixels, self.image_format)
        seed = zlib.crc32(str(record["image_id"]).encode())
        corrupted = Image.fromarray(corrupt(rgb, self.cell.corruption, self.cell.strength, seed))
        return convert_PIL_to_numpy(corrupted, self.image_format), size


def resized(cfg: CfgNode, size: float) -> CfgNode:
    """The config with images of `size` times the size.

    Raises:
        ValueError: the config does not say which size.
    """
    if size == 1:
        return cfg
    if not cfg.INPUT.MIN_SIZE_TEST or cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "other sizes need a size in INPUT.MIN_SIZE_TEST, and no TEST.AUG, which has sizes of its own: set it to "
            "the short side of the images, or measure without sizes (--sizes none)"
        )
    cfg = cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST = max(round(cfg.INPUT.MIN_SIZE_TEST * size), 1)
    cfg.INPUT.MAX_SIZE_TEST = max(round(cfg.INPUT.MAX_SIZE_TEST * size), 1)
    return cfg


def choose_cells(corruptions: Sequence[str], strengths: Sequence[int], sizes: Sequence[float]) -> list[Cell]:
    """The clean images first, then the others, each once.

    Raises:
        ValueError: an unknown corruption or strength, or a size that is not above 0.
    """
    for name in corruptions:
        check_corruption(name)
    for strength in strengths:
        if strength not in STRENGTHS:
            raise ValueError(f"strength {strength}: it must be one of {', '.join(map(str, STRENGTHS))}")
    for size in sizes:
        if not 0 < size < math.inf:
            raise ValueError(f"size {size:g}: it must be a factor above 0, such as 0.5")
    corrupted = [Cell(name, strength) for name in corruptions for strength in strengths]
    return list(dict.fromkeys([CLEAN, *corrupted, *(Cell(size=size) for size in sizes)]))


def measure(source: Source, cells: Sequence[Cell], folder: Path, processes: int = 1) -> Iterator[tuple[Cell, float]]:
    """Evaluate the cells that are not yet in the folder; `robustness.json` there is kept up to date.

    `corruptions.jpg` shows the first image under every corruption.

    Args:
        processes: that evaluate at the same time, each with a model of its own, on the same device.

    Yields:
        each evaluated cell and its AP in percent.

    Raises:
        ValueError: the folder holds another evaluation; the message names the differences.
        OSError: a process was killed.
        OSError, ValueError: see :class:`Evaluation`.
    """
    evaluate = Evaluation(source)
    for cell in cells:
        resized(evaluate.cfg, cell.size)
    check_folder(folder, evaluate.settings())
    write_result(folder)
    if not (folder / SHEET).is_file():
        evaluate.draw_first_image().save(folder / SHEET)
    done = read_cells(folder)
    waiting = [cell for cell in cells if cell not in done]
    if processes == 1 or len(waiting) < 2:
        results = ((cell, evaluate(cell)) for cell in waiting)
    else:
        del evaluate
        results = _in_processes(source, waiting, min(processes, len(waiting)))
    for cell, ap in results:
        write_cell(folder, cell, ap)
        write_result(folder)
        yield cell, ap


def digest_of_weights(model: nn.Module) -> str:
    """SHA-256 of all names and values of a model, the same whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _in_processes(source: Source, cells: Sequence[Cell], processes: int) -> Iterator[tuple[Cell, float]]:
    threads = max(torch.get_num_threads() // processes, 1)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(source, threads))
    try:
        tasks = {pool.submit(_evaluate, cell): cell for cell in cells}
        for task in as_completed(tasks):
            yield tasks[task], task.result()
    except BrokenProcessPool as error:
        raise OSError("a process was killed, probably for lack of memory: use fewer, what is finished stays") from error
    finally:
        pool.shutdown(cancel_futures=True)


_evaluation: Evaluation | None = None  # of this process


def _start(source: Source, threads: int) -> None:
    global _evaluation
    torch.set_num_threads(threads)
    _evaluation = Evaluation(source)


def _evaluate(cell: Cell) -> float:
    return _evaluation(cell)
