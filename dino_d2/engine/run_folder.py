"""Rules for the folder of a run: no run is overwritten, and none goes on with another model or other data."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

CONFIG = "config.yaml"  # written there by detectron2's default_setup
LAST = "last_checkpoint"
EVALUATION = "inference"  # folder of evaluations in OUTPUT_DIR, by detectron2's custom
# What must stay as it was for a run to go on; of MODEL everything but these.
FIXED = ("SEED", "DATASETS.TRAIN", "SOLVER.IMS_PER_BATCH", "DATALOADER.SAMPLER_TRAIN")
FREE_OF_MODEL = ("MODEL.WEIGHTS", "MODEL.TRUST_WEIGHTS", "MODEL.DEVICE", "MODEL.DINO.OP", "MODEL.DINO.CHECKPOINT")


def holds_run(folder: str) -> bool:
    """Whether there is a run that could go on."""
    return PathManager.isfile(os.path.join(folder, LAST))


def check_run_folder(cfg: CfgNode, resume: bool) -> None:
    """To be called before anything is written to `OUTPUT_DIR`.

    `resume` begins a run where there is none yet, so that one command serves a job that may be killed at any time.

    Raises:
        PermissionError: it cannot be written to.
        FileExistsError: it holds a run, which `resume` does not ask for.
        ValueError: the run there has another model, other data or another batch; each line names a key.
    """
    folder = cfg.OUTPUT_DIR
    run_is_there = holds_run(folder)
    if run_is_there and not resume:
        raise FileExistsError(
            f"{folder} holds a run. --resume goes on with it; another OUTPUT_DIR begins a new one; nothing was touched"
        )
    trial = os.path.join(folder, f".{os.getpid()}.part")
    try:
        PathManager.mkdirs(folder)
        with PathManager.open(trial, "w"):
            pass
        PathManager.rm(trial)
    except OSError as error:
        raise PermissionError(f"OUTPUT_DIR {folder} cannot be written to: {error}") from error
    config = os.path.join(folder, CONFIG)
    if run_is_there and PathManager.isfile(config):
        with PathManager.open(config) as file:
            lines = differences(_flat(file.read()), _flat(cfg.dump()))
        if lines:
            raise ValueError(
                f"--resume: the run in {folder} is another one:\n  " + "\n  ".join(lines) + "\n"
                "Use its settings, or another OUTPUT_DIR with MODEL.WEIGHTS from there"
            )


def set_up_folder(cfg: CfgNode, args: Namespace) -> None:
    """detectron2's `default_setup`, and the logger of dino_d2 beside detectron2's, in every process.

    An evaluation (`args.eval_only`) writes its log and config to `OUTPUT_DIR/inference`, as its results: the folder of
    a run stays as the training left it.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, EVALUATION) if args.eval_only else cfg.OUTPUT_DIR
    there = cfg.clone()
    there.defrost()
    there.OUTPUT_DIR = folder
    there.freeze()
    default_setup(there, args)
    setup_logger(folder, distributed_rank=comm.get_rank(), name="dino_d2")
    if comm.is_main_process():
        with PathManager.open(os.path.join(folder, CONFIG), "w") as file:
            file.write(cfg.dump())  # OUTPUT_DIR as it was given


def settings_of_training(cfg: CfgNode) -> dict[str, object]:
    """By full key what decides on the steps of a run, so that its processes must agree in it."""
    return {key: value for key, value in _flat(cfg.dump()).items() if _is_fixed(key) or key.startswith("SOLVER.")}


def differences(then: dict[str, object], now: dict[str, object]) -> list[str]:
    """A line for each key that must not have changed."""
    keys = [key for key in now if _is_fixed(key) and key in then]
    return [f"{key} was {then[key]}, is {now[key]}" for key in keys if then[key] != now[key]]


def _is_fixed(key: str) -> bool:
    return key in FIXED or (key.startswith("MODEL.") and not key.startswith(FREE_OF_MODEL))


def _flat(text: str) -> dict[str, object]:
    """Values of a config in YAML, by their full keys."""

    def walk(cfg: CfgNode, prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(CfgNode.load_cfg(text), ""))
