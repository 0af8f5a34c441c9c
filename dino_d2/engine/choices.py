"""From what a user says (a folder, weights, epochs, a batch) to a config: every choice is a KEY VALUE that is shown.

Nothing here trains. What is chosen goes over the recipe and under the user's own KEY VALUEs.
"""

from __future__ import annotations

import math
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from dino_d2.config import load_config
from dino_d2.data import CocoFiles, FoundDataset, find_dataset, load_config_for_files, register_datasets
from dino_d2.data.datasets import class_names_of
from dino_d2.data.inspection import as_table, inspect_dataset, training_can_start
from dino_d2.modeling.build import build_denoising
from dino_d2.modeling.denoising import NoDenoising
from dino_d2.pretrained import find_pretrained

from .batch_size import photographs_at_once
from .run_folder import EVALUATION, check_run_folder, holds_run

FEW_PHOTOS = Path(__file__).with_name("few_photos.yaml")  # the settings that `--data` lays over any recipe
EPOCHS = 24  # of `--data`
EVALUATIONS = 12  # in a run, no more than one an epoch
DECAY = (5, 6)  # the learning rate drops after this share of the run, as in the recipes of 24 and 36 epochs
DATA = "data"  # folder in OUTPUT_DIR of annotations that had to be written


@dataclass(frozen=True)
class Choice:
    """A config value and why it is that."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = str(self.value)
        quoted = f'"{value}"' if "'" in value and not set('"$`\\!') & set(value) else shlex.quote(value)
        return f"  {self.key} {quoted}" + (f"  # {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Run:
    """What `load_config_for_files` is called with. train, val: None where the config names the data sets."""

    config_file: str
    overrides: tuple[Any, ...]
    train: CocoFiles | None
    val: CocoFiles | None

    def config(self) -> CfgNode:
        return load_config_for_files(self.config_file, self.overrides, self.train, self.val)


def choose(args: Namespace) -> Run:
    """What the options of `tools/train_net.py` stand for. To be called in the main process; it prints its choices.

    Raises:
        OSError, ValueError, ImportError: of what the user gave; nothing of a run is overwritten.
    """
    config_file, choices = _model(args)
    if args.output:
        choices.append(Choice("OUTPUT_DIR", args.output, "--output"))
    if args.data and not args.eval_only:
        choices += [Choice(key, value, FEW_PHOTOS.name) for key, value in few_photos()]
    train, val = (CocoFiles(*files) if files else None for files in (args.train, args.val))
    if args.data:
        found = _find(args, load_config(config_file, [*_flat(choices), *args.opts]))
        choices += _classes(found)
        train, val = None if args.eval_only else found.train, found.val
    if not args.eval_only and (args.data or args.epochs or args.batch_size):
        choices += _training(args, Run(config_file, (*_flat(choices), *args.opts), train, val))
    _show(choices, args.opts)
    return Run(config_file, (*_flat(choices), *args.opts), train, val)


def few_photos() -> list[tuple[str, Any]]:
    """KEY and VALUE of the settings for fine-tuning on few photographs."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return list(walk(yaml.safe_load(FEW_PHOTOS.read_text()), ""))


def schedule(images: int, batch: int, epochs: int, warmup: int) -> list[Choice]:
    """Length, decay and evaluations of a run.

    Args:
        images: to train on.
        batch: images of a step, of all processes.
        epochs: in each of which every image is seen once, rounded up to whole steps.
        warmup: iterations that the config has for it.
    """
    epoch = math.ceil(images / batch)
    length = epochs * epoch
    every = math.ceil(epochs / EVALUATIONS)
    drop = length * DECAY[0] // DECAY[1]
    each = "every epoch" if every == 1 else f"every {every} epochs"
    choices = [
        Choice("SOLVER.MAX_ITER", length, f"{epochs} epochs of {epoch}: {images} images, {batch} a step"),
        Choice("SOLVER.STEPS", (drop,) if drop else (), f"after {DECAY[0]} of {DECAY[1]} parts"),
        Choice("TEST.EVAL_PERIOD", every * epoch, each),
        Choice("SOLVER.CHECKPOINT_PERIOD", every * epoch, each),
    ]
    if warmup > epoch:
        choices.append(Choice("SOLVER.WARMUP_ITERS", epoch, "an epoch"))
    return choices


def batch_choices(cfg: CfgNode, batch: int) -> list[Choice]:
    """The rule for the learning rate: linear in the batch, from the pair that the config has."""
    if batch == cfg.SOLVER.IMS_PER_BATCH:
        return []
    rate = cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH
    reason = f"linear in the batch: {cfg.SOLVER.BASE_LR:g} is for {cfg.SOLVER.IMS_PER_BATCH}"
    return [Choice("SOLVER.IMS_PER_BATCH", batch, ""), Choice("SOLVER.BASE_LR", float(f"{rate:.4g}"), reason)]


def _model(args: Namespace) -> tuple[str, list[Choice]]:
    """The config file, and what the weights need over it."""
    if not args.weights:
        return args.config_file, []
    found = find_pretrained(args.weights, args.config_file)
    settings = zip(found.settings[::2], found.settings[1::2], strict=True)
    choices = [Choice(key, value, f"what {args.weights} needs") for key, value in settings]
    return found.config_file, [*choices, Choice("MODEL.WEIGHTS", found.weights, "--weights")]


def _find(args: Namespace, cfg: CfgNode) -> FoundDataset:
    """What `--data` holds; annotations that have to be written go to `OUTPUT_DIR`, of an evaluation to its folder."""
    goes_on = False
    if args.eval_only:
        folder = Path(cfg.OUTPUT_DIR, EVALUATION, DATA)
    else:
        folder = Path(cfg.OUTPUT_DIR, DATA)
        goes_on = _goes_on(args, cfg)
        if not goes_on:
            check_run_folder(cfg, resume=False)  # before anything is written there
    found = find_dataset(args.data, folder, may_replace=not goes_on)
    print(f"{args.data}: {found.layout}, {found.counts[0]} images to train on, {found.counts[1]} to evaluate on")
    for note in found.notes:
        print(f"  {note}")
    return found


def _goes_on(args: Namespace, cfg: CfgNode) -> bool:
    return bool(args.resume or args.resume_from) and holds_run(cfg.OUTPUT_DIR)


def _training(args: Namespace, run: Run) -> list[Choice]:
    """Batch and length, after the data were looked through, unless they were when the run began."""
    cfg = run.config()
    register_datasets(cfg)
    if args.data and not _goes_on(args, cfg):
        _inspect(cfg, run.train, run.val)
    choices = [*_weights_are_whole(cfg, args), *_batch(cfg, args), *(_device(cfg) if args.data else [])]
    epochs = args.epochs or (EPOCHS if args.data else 0)
    if epochs:
        batch = next((x.value for x in choices if x.key == "SOLVER.IMS_PER_BATCH"), cfg.SOLVER.IMS_PER_BATCH)
        choices += schedule(_images(cfg), batch, epochs, cfg.SOLVER.WARMUP_ITERS)
    return [choice for choice in choices if cfg.DATASETS.TEST or choice.key != "TEST.EVAL_PERIOD"]


def _classes(found: FoundDataset) -> list[Choice]:
    """As overrides, since the config of the weights may have other ones."""
    names = class_names_of(found.train.annotations)
    return [
        Choice("MODEL.DINO.NUM_CLASSES", len(names), "the categories of the data"),
        Choice("MODEL.DINO.CLASS_NAMES", names, ""),
    ]


def _inspect(cfg: CfgNode, *parts: CocoFiles) -> None:
    """
    Raises:
        ValueError: there are errors; all findings are printed before.
    """
    denoising = build_denoising(cfg)
    faulty = []
    for files in parts:
        print(f"{files.annotations}: reading the images …", flush=True)
        findings = inspect_dataset(files, None if isinstance(denoising, NoDenoising) else denoising)
        print(as_table(findings) if findings else "  nothing to report")
        if not training_can_start(findings):
            faulty.append(str(files.annotations))
    if faulty:
        raise ValueError(f"training cannot start: correct the errors above in {' and '.join(faulty)}")


def _weights_are_whole(cfg: CfgNode, args: Namespace) -> list[Choice]:
    if not (args.weights and cfg.MODEL.TIMM.PRETRAINED):
        return []
    return [Choice("MODEL.TIMM.PRETRAINED", False, "the weights have the backbone's")]


def _device(cfg: CfgNode) -> list[Choice]:
    if cfg.MODEL.DEVICE != "cpu" or not cfg.SOLVER.AMP.ENABLED:
        return []
    return [Choice("SOLVER.AMP.ENABLED", False, "on a CPU it saves nothing")]


def _batch(cfg: CfgNode, args: Namespace) -> list[Choice]:
    """What a step is made of: the batch, the learning rate that goes with it, and the parts it is worked on in."""
    asked = args.batch_size or ("auto" if args.data else None)
    if asked is None:
        return []
    processes = comm.get_world_size()
    if asked != "auto":
        return batch_choices(cfg, asked)
    batch = math.ceil(cfg.SOLVER.IMS_PER_BATCH / processes) * processes
    choices = batch_choices(cfg, batch)
    if "SOLVER.ACCUMULATION_STEPS" in args.opts[::2]:
        return choices
    share = batch // processes
    trial = cfg.clone()
    trial.MODEL.TIMM.PRETRAINED = False
    size = photographs_at_once(trial, share, _most_objects(cfg))
    where = "a CPU is given" if cfg.MODEL.DEVICE == "cpu" else "there is memory for"
    reason = f"{where} {size} at once, {batch} make a step" + (f" of {processes} processes" if processes > 1 else "")
    return [*choices, Choice("SOLVER.ACCUMULATION_STEPS", share // size, reason)]


def _images(cfg: CfgNode) -> int:
    return sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)


def _most_objects(cfg: CfgNode) -> int:
    return max(len(record["annotations"]) for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name))


def _flat(choices: Sequence[Choice]) -> list[Any]:
    return [part for choice in choices for part in (choice.key, choice.value)]


def _show(choices: Sequence[Choice], overrides: Sequence[str]) -> None:
    """The last of each key, without those that the user gives otherwise."""
    last = {choice.key: choice for choice in choices if choice.key not in overrides[::2]}
    if last:
        print("Chosen, as KEY VALUE (your own at the end of the command win):")
        print("\n".join(map(str, last.values())), flush=True)
