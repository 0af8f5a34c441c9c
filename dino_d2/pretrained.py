"""Find the weights that a user names, and their config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import model_zoo
from .model_zoo.weights import downloaded

CONFIG, SAVED = "config.yaml", "model.safetensors"  # in a folder written by `Detector.save_pretrained`
CARD = "README.md"
FINAL = "model_final.pth"  # the last checkpoint of a run that is over
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A publisher does not decide where a user's files are, which are read, and where metrics are sent.
NOT_FROM_HUB = (
    "OUTPUT_DIR", "./output", "WANDB_PROJECT", "", "MODEL.TIMM.PRETRAINED", False,
    "DATASETS.TRAIN", (), "DATASETS.TEST", (), "DATASETS.COCO_FORMAT", [],
)  # fmt: skip
HELP = (
    "give a name listed by `dino-d2 zoo`, a checkpoint, the OUTPUT_DIR of a training run, a folder written by "
    "save_pretrained, or a Hugging Face repository id (owner/name)"
)


@dataclass(frozen=True)
class Pretrained:
    """Weights and their config.

    config_file: path of a config, or name of a recipe.
    settings: KEY, VALUE, … that override it.
    weights: the value for `MODEL.WEIGHTS`.
    """

    config_file: str
    settings: tuple[Any, ...]
    weights: str


def find_pretrained(name: str, config_file: str | None = None) -> Pretrained:
    """Find weights and their config.

    Args:
        name: a name in the model zoo; a checkpoint (with `config_file`, or a config.yaml beside it); a folder, either
            the OUTPUT_DIR of a training run (best weights, else the last) or one written by `save_pretrained`; a
            Hugging Face repository id.
        config_file: use this config instead of the one found with the weights.

    Raises:
        FileNotFoundError: the weights or their config were not found.
        ValueError: the repository's config refers to other files.
    """
    name = str(name).removeprefix("dino://")
    if name in model_zoo.entries():
        found = Pretrained(model_zoo.get_config_file(name), tuple(model_zoo.settings_of(name)), f"dino://{name}")
        return Pretrained(config_file, (), found.weights) if config_file else found
    path = Path(name)
    if path.is_dir():
        weights = _weights_in(path)
    elif name.startswith(("http://", "https://")):
        weights = downloaded(name)
    elif path.is_file() or "://" in name:
        weights = name
    elif HUB_ID.fullmatch(name):
        path = _from_hub(name)
        return Pretrained(config_file or str(path / CONFIG), NOT_FROM_HUB, str(path / SAVED))
    else:
        raise FileNotFoundError(f"weights {name} not found: {HELP}")
    if config_file is None:
        beside = (path if path.is_dir() else path.parent) / CONFIG
        if not beside.is_file():
            raise FileNotFoundError(f"no config found for {name}: {beside} does not exist; give a config file")
        config_file = str(beside)
    return Pretrained(config_file, (), weights)


def _weights_in(folder: Path) -> str:
    record = folder / "last_checkpoint"
    last = record.read_text().strip() if record.is_file() else FINAL
    of_average = ["model_final_ema.pth"] if last == FINAL else []  # else from before the run was continued
    names = [SAVED, "model_best.pth", *of_average, last]
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    raise FileNotFoundError(f"no weights found in {folder} (looked for {', '.join(names)}); {HELP}")


def _from_hub(name: str) -> Path:
    """Download a repository's config and weights, which cannot run code.

    Of the config, what refers to other files is refused or, see `NOT_FROM_HUB`, replaced.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{name}: downloading from Hugging Face needs pip install huggingface_hub") from error
    try:
        config, weights = (Path(hf_hub_download(name, file)) for file in (CONFIG, SAVED))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"weights {name} not found here, and Hugging Face cannot be reached: {HELP}") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hugging Face repository {name} lacks {CONFIG} or {SAVED}; no other files are read from there"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"weights {name} not found, neither here nor on Hugging Face: {HELP}") from error
    try:
        content = yaml.safe_load(config.read_text()) or {}
        timm_name = content.get("MODEL", {}).get("TIMM", {}).get("NAME", "")
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"the {CONFIG} of {name} on Hugging Face is not a plain YAML config: {error}") from error
    if "_BASE_" in content:
        raise ValueError(f"the {CONFIG} of {name} on Hugging Face has a _BASE_, which is not allowed there")
    if ":" in str(timm_name):
        raise ValueError(f"the {CONFIG} of {name} on Hugging Face wants a model from elsewhere: {timm_name}")
    return weights.parent
