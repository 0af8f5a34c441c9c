"""Where the weights are that a user names, and which config they go with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import model_zoo

CONFIG, SAVED = "config.yaml", "model.safetensors"  # of a folder made by `Detector.save_pretrained`
CARD = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HELP = (
    "it can be a name that `dino-d2 zoo` lists, a checkpoint, the OUTPUT_DIR of a training, a folder made by "
    "save_pretrained, or the id of a repository on Hugging Face (owner/name)"
)


@dataclass(frozen=True)
class Pretrained:
    """
    config_file: path of a config, or name of a recipe.
    settings: KEY, VALUE, … that go over it.
    weights: what `MODEL.WEIGHTS` would be.
    """

    config_file: str
    settings: tuple[Any, ...]
    weights: str


def find_pretrained(name: str, config_file: str | None = None) -> Pretrained:
    """
    Args:
        name: one of the zoo; a checkpoint (`config_file`, or a config.yaml beside it); a folder: the OUTPUT_DIR of a
            training (its best weights, else its last), or one made by `save_pretrained`; a repository on Hugging Face.
        config_file: that the weights go with, instead of the one that is found with them.

    Raises:
        FileNotFoundError: there is nothing of that name, no weights in the folder, or no config.
        ValueError: what a hub holds is not what can be taken from a hub.
    """
    name = str(name).removeprefix("dino://")
    if name in model_zoo.entries():
        found = Pretrained(model_zoo.get_config_file(name), tuple(model_zoo.settings_of(name)), f"dino://{name}")
        return Pretrained(config_file, (), found.weights) if config_file else found
    path = Path(name)
    if path.is_dir():
        weights = _weights_in(path)
    elif path.is_file() or "://" in name:
        weights = name
    elif HUB_ID.fullmatch(name):
        path = _from_hub(name)
        weights = str(path / SAVED)
    else:
        raise FileNotFoundError(f"there are no weights {name}: {HELP}")
    if config_file is None:
        beside = (path if path.is_dir() else path.parent) / CONFIG
        if not beside.is_file():
            raise FileNotFoundError(f"{name}: which config do they go with? There is no {beside}: give a config file")
        config_file = str(beside)
    return Pretrained(config_file, (), weights)


def _weights_in(folder: Path) -> str:
    last = folder / "last_checkpoint"
    names = [SAVED, "model_best.pth", "model_final_ema.pth", "model_final.pth"]
    names += [last.read_text().strip()] if last.is_file() else []
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"there are no weights in {folder}: none of {', '.join(dict.fromkeys(names))}; {HELP}")


def _from_hub(name: str) -> Path:
    """The folder with config and weights of a repository, whose files run no code and lead nowhere else."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{name}: a repository on Hugging Face needs pip install huggingface_hub") from error
    try:
        config, weights = (Path(hf_hub_download(name, file)) for file in (CONFIG, SAVED))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there are no weights {name} here, and Hugging Face cannot be reached: {HELP}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {name} on Hugging Face lacks {CONFIG} or {SAVED}, and other files are not read from a hub"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"there are no weights {name} here, nor on Hugging Face: {HELP}") from error
    if "_BASE_" in (yaml.safe_load(config.read_text()) or {}):
        raise ValueError(f"the {CONFIG} of {name} has a _BASE_, which is not followed from a hub")
    return weights.parent
