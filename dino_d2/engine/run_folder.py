"""Protect OUTPUT_DIR: no run is overwritten, or resumed with another model or other data."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from dino_d2.checkpoint.files import write_atomically
from dino_d2.config import flat
from dino_d2.data.datasets import fingerprints

CONFIG = "config.yaml"  # written there by detectron2's default_setup
LAST = "last_checkpoint"
TRAINING_DATA = "training_data.json"
EVALUATION = "inference"  # detectron2's folder for evaluations in OUTPUT_DIR
# Keys that must not change when a run is resumed; of MODEL all but FREE_OF_MODEL.
FIXED = ("SEED", "DATASETS.TRAIN", "SOLVER.IMS_PER_BATCH", "DATALOADER.SAMPLER_TRAIN")
FREE_OF_MODEL = ("MODEL.WEIGHTS", "MODEL.TRUST_WEIGHTS", "MODEL.DEVICE", "MODEL.DINO.OP", "MODEL.DINO.CHECKPOINT")


def holds_run(folder: str) -> bool:
    """Whether the folder has a run that can be resumed."""
    return PathManager.isfile(os.path.join(folder, LAST))


def check_run_folder(cfg: CfgNode, resume: bool) -> None:
    """Check `OUTPUT_DIR` before anything is written to it.

    `resume` starts a new run if there is none, so that the same command works for a job that may be killed.

    Raises:
        PermissionError: the folder is not writable.
        FileExistsError: it holds a run or weights of one, and `resume` is False.
        ValueError: the run there has another model, data or batch size; each line names a key or a dataset.
    """
    folder = cfg.OUTPUT_DIR
    has_run = holds_run(folder)
    if has_run and not resume:
        raise FileExistsError(
            f"{folder} already holds a run. Pass --resume to continue it, or choose another OUTPUT_DIR; nothing was "
            "changed"
        )
    weights = _weights_in(folder)
    if weights and not resume:
        raise FileExistsError(
            f"{folder} holds {weights[0]} of another run, which has no last_checkpoint to continue from. Choose "
            "another OUTPUT_DIR, or begin that run again with --resume, which overwrites it; nothing was changed"
        )
    trial = os.path.join(folder, f".{os.getpid()}.part")
    try:
        PathManager.mkdirs(folder)
        with PathManager.open(trial, "w"):
            pass
        PathManager.rm(trial)
    except OSError as error:
        raise PermissionError(f"OUTPUT_DIR {folder} is not writable: {error}") from error
    if has_run:
        lines = [*_differences_of_settings(folder, cfg), *_differences_of_data(folder, cfg.DATASETS.TRAIN)]
        if lines:
            raise ValueError(
                f"--resume: the run in {folder} has other settings or data:\n  " + "\n  ".join(lines) + "\n"
                "Use those, or another OUTPUT_DIR with MODEL.WEIGHTS from that run"
            )


def _differences_of_settings(folder: str, cfg: CfgNode) -> list[str]:
    path = os.path.join(folder, CONFIG)
    if not PathManager.isfile(path):
        return []
    with PathManager.open(path) as file:
        return differences(_flat(file.read()), _flat(cfg.dump()))


def _differences_of_data(folder: str, datasets: Iterable[str]) -> list[str]:
    """One line for each training dataset that is not the run's, wherever its files are. A run without a record, which
    was begun by an earlier version, has none."""
    path = os.path.join(folder, TRAINING_DATA)
    if not PathManager.isfile(path):
        return []
    with PathManager.open(path) as file:
        then, now = json.load(file), fingerprints(datasets)
    changed = [name for name in now if name in then and then[name] != now[name]]
    return [_difference(name, then[name], now[name]) for name in changed]


def _difference(name: str, then: dict[str, Any], now: dict[str, Any]) -> str:
    if then["images"] != now["images"]:
        return f"{name} had {then['images']} images, has {now['images']} now"
    return f"{name} has {now['images']} images as before, but other annotations or classes in its file"


def _weights_in(folder: str) -> list[str]:
    """Names of the files that a run writes for its weights, such as model_best.pth."""
    names = PathManager.ls(folder) if PathManager.isdir(folder) else []
    return [name for name in sorted(names) if name.startswith("model_") and name.endswith(".pth")]


def set_up_folder(cfg: CfgNode, args: Namespace) -> None:
    """detectron2's `default_setup`, plus the logger of dino_d2, in every process.

    An evaluation (`args.eval_only`) writes its log and config to `OUTPUT_DIR/inference`, like its results, and leaves
    the rest of the run's folder unchanged.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, EVALUATION) if args.eval_only else cfg.OUTPUT_DIR
    cfg_for_setup = cfg.clone()
    cfg_for_setup.defrost()
    cfg_for_setup.OUTPUT_DIR = folder
    cfg_for_setup.freeze()
    default_setup(cfg_for_setup, args)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="dino_d2")
    if comm.is_main_process():
        with PathManager.open(os.path.join(folder, CONFIG), "w") as file:
            file.write(cfg.dump())  # with the original OUTPUT_DIR
        if not args.eval_only:
            record_data(cfg)


def record_data(cfg: CfgNode) -> None:
    """Write what `check_run_folder` compares the training data with when the run is resumed."""
    content = json.dumps(fingerprints(cfg.DATASETS.TRAIN), indent=2).encode()
    write_atomically(cfg.OUTPUT_DIR, TRAINING_DATA, lambda file: file.write(content))


def settings_of_training(cfg: CfgNode) -> dict[str, object]:
    """Settings, by dotted key, that affect training steps and must be the same in all processes."""
    return {key: value for key, value in _flat(cfg.dump()).items() if _is_fixed(key) or key.startswith("SOLVER.")}


def differences(then: dict[str, object], now: dict[str, object]) -> list[str]:
    """One line for each changed key that must not change."""
    keys = [key for key in now if _is_fixed(key) and key in then]
    return [f"{key} was {then[key]}, is now {now[key]}" for key in keys if then[key] != now[key]]


def _is_fixed(key: str) -> bool:
    return key in FIXED or (key.startswith("MODEL.") and not key.startswith(FREE_OF_MODEL))


def _flat(text: str) -> dict[str, object]:
    """Values of a YAML config by dotted key."""
    return flat(CfgNode.load_cfg(text))
