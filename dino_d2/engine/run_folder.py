"""Rules for the folder of a run: no run is overwritten, and none goes on with another model or other data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode

CONFIG = "config.yaml"  # written there by detectron2's default_setup
LAST = "last_checkpoint"
# What must stay as it was for a run to go on; of MODEL everything but these.
FIXED = ("SEED", "DATASETS.TRAIN", "SOLVER.IMS_PER_BATCH", "DATALOADER.SAMPLER_TRAIN")
FREE_OF_MODEL = ("MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.DINO.OP", "MODEL.DINO.CHECKPOINT")


def check_run_folder(cfg: CfgNode, resume: bool) -> None:
    """To be called before anything is written to `OUTPUT_DIR`.

    Raises:
        PermissionError: it cannot be written to.
        FileExistsError: it holds a run, which `resume` does not ask for.
        FileNotFoundError: `resume` asks for a run and there is none.
        ValueError: the run there has another model, other data or another batch; each line names a key.
    """
    folder = Path(cfg.OUTPUT_DIR)
    holds_run = (folder / LAST).exists()
    if resume and not holds_run:
        raise FileNotFoundError(f"--resume: {folder} holds no run (no file {LAST}); leave --resume out to begin one")
    if holds_run and not resume:
        raise FileExistsError(
            f"{folder} holds a run. --resume goes on with it; another OUTPUT_DIR begins a new one; nothing was touched"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"OUTPUT_DIR {folder} cannot be written to: {error}") from error
    if resume and (folder / CONFIG).exists():
        lines = differences(_flat((folder / CONFIG).read_text()), _flat(cfg.dump()))
        if lines:
            raise ValueError(
                f"--resume: the run in {folder} is another one:\n  " + "\n  ".join(lines) + "\n"
                "Use its settings, or another OUTPUT_DIR with MODEL.WEIGHTS from there"
            )


def differences(then: dict[str, object], now: dict[str, object]) -> list[str]:
    """A line for each key that must not have changed."""
    keys = [key for key in now if key in FIXED or (key.startswith("MODEL.") and not key.startswith(FREE_OF_MODEL))]
    return [f"{key} was {then[key]}, is {now[key]}" for key in keys if key in then and then[key] != now[key]]


def _flat(text: str) -> dict[str, object]:
    """Values of a config in YAML, by their full keys."""

    def walk(cfg: CfgNode, prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(CfgNode.load_cfg(text), ""))
