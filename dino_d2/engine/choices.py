"""Derive config values from command-line options (folder, weights, length, batch size), and print them as KEY VALUE.

They override the recipe and are overridden by the user's own KEY VALUEs.
"""

from __future__ import annotations

import math
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dino_d2.config import load_config, overlay
from dino_d2.data import CocoFiles, FoundDataset, find_dataset, load_config_for_files, register_datasets
from dino_d2.data.datasets import class_names_of
from dino_d2.data.inspection import report
from dino_d2.data.loader import share_of_batch
from dino_d2.data.mosaic import PARTS
from dino_d2.meta_arch.augmented_inference import augmentation_keys
from dino_d2.modeling.build import build_denoising
from dino_d2.modeling.denoising import NoDenoising
from dino_d2.pretrained import find_pretrained

from .batch_size import largest_batch
from .pace import WORTH_BFLOAT16, bfloat16_share, seconds_per_step
from .run_folder import EVALUATION, check_run_folder, holds_run

FEW_PHOTOS, FINE_TUNING = "few_photos", "fine_tuning"  # overlays for `--data`; the second if a detector is the start
EPOCHS = 24  # default with `--data`
EVALUATIONS = 12  # per run, at most one per epoch; and as many checkpoints
WARMUP = 10  # one part in so many of the run, at most
DECAY = (5, 6)  # the learning rate drops after 5/6 of the run, as in the recipes of 24 and 36 epochs
DATA = "data"  # folder in OUTPUT_DIR for converted annotations


@dataclass(frozen=True)
class Choice:
    """A config value and the reason for it."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = str(self.value)
        quoted = f'"{value}"' if "'" in value and not set('"$`\\!') & set(value) else shlex.quote(value)
        return f"  {self.key} {quoted}" + (f"  # {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Run:
    """Arguments of `load_config_for_files`. train, val: None if the config names the datasets."""

    config_file: str
    overrides: tuple[Any, ...]
    train: CocoFiles | None
    val: CocoFiles | None

    def config(self) -> CfgNode:
        return load_config_for_files(self.config_file, self.overrides, self.train, self.val)


def choose(args: Namespace) -> Run:
    """Translate the options of `tools/train_net.py` and print the chosen values. Call it in the main process only.

    Raises:
        OSError, ValueError, ImportError: invalid options or data; no existing run is overwritten.
    """
    config_file, choices = _model(args)
    if args.output:
        choices.append(Choice("OUTPUT_DIR", args.output, "--output"))
    if args.data and not args.eval_only:
        names = [FEW_PHOTOS, FINE_TUNING] if args.weights else [FEW_PHOTOS]
        choices += [Choice(key, value, f"{name}.yaml") for name in names for key, value in overlay(name)]
    train, val = (CocoFiles(*files) if files else None for files in (args.train, args.val))
    if args.data:
        found = _find(args, load_config(config_file, [*_flat(choices), *args.opts]))
        train, val = found.train, found.val
        choices += _classes(train or val)
    if args.augment:
        keys = augmentation_keys(load_config(config_file, [*_flat(choices), *args.opts]))
        choices += [Choice(key, value, "--augment") for key, value in keys.items()]
    if train and not val:
        choices += _without_evaluation(load_config(config_file, _flat(choices)))
    if not args.eval_only and (args.data or args.epochs or args.minutes or args.batch_size):
        choices += _training(args, Run(config_file, (*_flat(choices), *args.opts), train, val))
    _show(choices, args.opts)
    return Run(config_file, (*_flat(choices), *args.opts), train, val)


def schedule(length: int, epoch: int, warmup: int, reason: str) -> list[Choice]:
    """Length, warm-up and decay of the learning rate, and periods of evaluations and checkpoints of a run.

    Args:
        length: steps.
        epoch: steps of an epoch.
        warmup: the config's warmup iterations.
        reason: for the length.
    """
    every = math.ceil(length / epoch / EVALUATIONS)
    saved = max(1, round(every * epoch * EVALUATIONS / length))  # times per evaluation: more than once in short runs
    drop = length * DECAY[0] // DECAY[1]
    each = "every epoch" if every == 1 else f"every {every} epochs"
    choices = [
        Choice("SOLVER.MAX_ITER", length, reason),
        Choice("SOLVER.STEPS", (drop,) if drop else (), f"after {DECAY[0]}/{DECAY[1]} of the run"),
        Choice("TEST.EVAL_PERIOD", every * epoch, each),
        Choice("SOLVER.CHECKPOINT_PERIOD", math.ceil(every * epoch / saved), each if saved == 1 else ""),
    ]
    longest, what = min((epoch, "one epoch"), (length // WARMUP, f"1/{WARMUP} of the run"))
    if warmup > longest:
        choices.append(Choice("SOLVER.WARMUP_ITERS", longest, what))
    return choices


def batch_choices(cfg: CfgNode, batch: int) -> list[Choice]:
    """Scale the learning rate linearly with the batch size, relative to the config's values."""
    if batch == cfg.SOLVER.IMS_PER_BATCH:
        return []
    rate = cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH
    reason = f"scaled with the batch size: {cfg.SOLVER.BASE_LR:g} is for {cfg.SOLVER.IMS_PER_BATCH}"
    return [Choice("SOLVER.IMS_PER_BATCH", batch, ""), Choice("SOLVER.BASE_LR", float(f"{rate:.4g}"), reason)]


def _model(args: Namespace) -> tuple[str, list[Choice]]:
    """The config file, and the settings that the weights need."""
    if not args.weights:
        return args.config_file, []
    found = find_pretrained(args.weights, args.config_file)
    settings = zip(found.settings[::2], found.settings[1::2], strict=True)
    choices = [Choice(key, value, f"needed by {args.weights}") for key, value in settings]
    choices += [Choice("MODEL.WEIGHTS", found.weights, "--weights")]
    return found.config_file, [*choices, Choice("MODEL.TIMM.PRETRAINED", False, "--weights includes the backbone")]


def _without_evaluation(cfg: CfgNode) -> list[Choice]:
    """For recipes, and configs of runs whose weights are trained on, that keep the best of several evaluations."""
    reason = "no data to evaluate on"
    off = {"BEST_METRIC": "", "EARLY_STOPPING": 0}
    return [Choice(f"SOLVER.{key}", value, reason) for key, value in off.items() if cfg.SOLVER[key]]


def _find(args: Namespace, cfg: CfgNode) -> FoundDataset:
    """What `--data` holds; annotations that have to be written go to `OUTPUT_DIR`, of an evaluation to its folder."""
    goes_on = False
    if args.eval_only:
        folder = Path(cfg.OUTPUT_DIR, EVALUATION, DATA)
    else:
        folder = Path(cfg.OUTPUT_DIR, DATA)
        goes_on = _goes_on(args, cfg)
        if not goes_on:
            check_run_folder(cfg, resume=_may_go_on(args))  # before anything is written there
    found = find_dataset(args.data, folder, may_replace=not goes_on, training=not args.eval_only)
    train, val = found.counts
    counts = f"{val} images to evaluate on" if args.eval_only else f"{train} images to train on, {val} to evaluate on"
    print(f"{args.data}: {found.layout}, {counts}")
    for note in found.notes:
        print(f"  {note}")
    return found


def _goes_on(args: Namespace, cfg: CfgNode) -> bool:
    return _may_go_on(args) and holds_run(cfg.OUTPUT_DIR)


def _may_go_on(args: Namespace) -> bool:
    return bool(args.resume or args.resume_from)


def _training(args: Namespace, run: Run) -> list[Choice]:
    """Batch and length, after the data were looked through, unless they were when the run began."""
    cfg = run.config()
    register_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    begun = _goes_on(args, cfg)
    if args.data and not begun:
        _inspect(cfg, run.train, run.val)
    choices = [*_batch(cfg, args), *(_precision(cfg, begun) if args.data or args.minutes else [])]
    epochs = args.epochs or (EPOCHS if args.data and not args.minutes else 0)
    if epochs or args.minutes:
        choices += _length(cfg, [*_flat(choices), *args.opts], epochs, args.minutes, begun)
    return [choice for choice in choices if cfg.DATASETS.TEST or choice.key != "TEST.EVAL_PERIOD"]


def _length(cfg: CfgNode, chosen: Sequence[Any], epochs: int, minutes: float | None, begun: bool) -> list[Choice]:
    """So many epochs, each rounded up to whole steps, or as many steps as take so many minutes. A run that has begun
    keeps its length: the pace would be measured otherwise now."""
    cfg = cfg.clone()
    cfg.merge_from_list(list(chosen))
    # As for one process: SOLVER.REFERENCE_WORLD_SIZE may still scale it.
    images, batch = _images(cfg), share_of_batch(cfg.SOLVER.IMS_PER_BATCH, 1)
    epoch = math.ceil(images / batch)
    length, reason = epochs * epoch, f"{epochs} epochs of {epoch}: {images} images, {batch} per step"
    if minutes and begun:
        length = _as_begun(cfg)["SOLVER"]["MAX_ITER"]
        reason = "as the run was begun"
    elif minutes:
        cfg.MODEL.TIMM.PRETRAINED = False
        pace = seconds_per_step(cfg, batch // comm.get_world_size(), cfg.SOLVER.ACCUMULATION_STEPS)
        length = max(int(60 * minutes / pace), 1)
        reason = f"{minutes:g} minutes at {pace:.3g} s per step, measured now; {length / epoch:.1f} epochs"
    return schedule(length, epoch, cfg.SOLVER.WARMUP_ITERS, reason)


def _classes(files: CocoFiles) -> list[Choice]:
    """The classes as overrides, because the config of the weights may have others."""
    names = class_names_of(files.annotations)
    return [
        Choice("MODEL.DINO.NUM_CLASSES", len(names), "the categories of the data"),
        Choice("MODEL.DINO.CLASS_NAMES", names, ""),
    ]


def _inspect(cfg: CfgNode, *parts: CocoFiles) -> None:
    """
    Raises:
        ValueError: the data has errors; all findings have been printed.
    """
    denoising = build_denoising(cfg)
    input_size = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    faulty = report(parts, None if isinstance(denoising, NoDenoising) else denoising, input_size)
    if faulty:
        names = " and ".join(str(files.annotations) for files in faulty)
        raise ValueError(f"training cannot start: correct the errors above in {names}")


def _precision(cfg: CfgNode, begun: bool) -> list[Choice]:
    """Mixed precision on a CPU, if the recipe has it: bfloat16 where the processor is quicker with it. A run that has
    begun keeps what it has."""
    if cfg.MODEL.DEVICE != "cpu" or not cfg.SOLVER.AMP.ENABLED:
        return []
    if begun:
        amp = _as_begun(cfg)["SOLVER"]["AMP"]
        return [Choice(f"SOLVER.AMP.{key}", amp[key], "as the run was begun") for key in ("ENABLED", "DTYPE")]
    share = bfloat16_share()
    reason = f"bfloat16 products take {share:.2g} of float32's time on this processor, measured now"
    pays = share <= WORTH_BFLOAT16
    choices = [Choice("SOLVER.AMP.ENABLED", pays, reason)]
    return [*choices, Choice("SOLVER.AMP.DTYPE", "bfloat16", "float16 is for GPUs")] if pays else choices


def _as_begun(cfg: CfgNode) -> dict[str, Any]:
    """The config that the run in OUTPUT_DIR was begun with."""
    with PathManager.open(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as file:
        return yaml.safe_load(file)


def _batch(cfg: CfgNode, args: Namespace) -> list[Choice]:
    """The batch size, the matching learning rate, and the number of accumulation steps."""
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
    share = share_of_batch(batch, processes)
    trial = cfg.clone()
    trial.MODEL.TIMM.PRETRAINED = False
    size = largest_batch(trial, share, _most_objects(cfg))
    where = "CPU" if cfg.MODEL.DEVICE == "cpu" else "memory"
    reason = f"{size} images at a time ({where}), {batch} per step" + (
        f" over {processes} processes" if processes > 1 else ""
    )
    return [*choices, Choice("SOLVER.ACCUMULATION_STEPS", share // size, reason)]


def _images(cfg: CfgNode) -> int:
    return sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)


def _most_objects(cfg: CfgNode) -> int:
    """In one training image; of a mosaic as many as its images may have."""
    most = max(len(record["annotations"]) for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name))
    return most * (max(PARTS) if cfg.INPUT.MOSAIC else 1)


def _flat(choices: Sequence[Choice]) -> list[Any]:
    return [part for choice in choices for part in (choice.key, choice.value)]


def _show(choices: Sequence[Choice], overrides: Sequence[str]) -> None:
    """Print the last choice for each key, except those that the user overrides."""
    last = {choice.key: choice for choice in choices if choice.key not in overrides[::2]}
    if last:
        print("Chosen settings (KEY VALUE; override any of them at the end of the command):")
        print("\n".join(map(str, last.values())), flush=True)
