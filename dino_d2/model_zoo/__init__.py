"""Published DINO weights by name, like detectron2's `model_zoo`.

    model = model_zoo.get("dino_r50_4scale_12ep", trained=True)

With a config, `MODEL.WEIGHTS dino://NAME` loads the same weights.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from dino_d2.checkpoint import DINOCheckpointer
from dino_d2.config import find_config_file, load_config

from .download import DownloadError
from .table import Entry, entries, find
from .weights import PREFIX, register

__all__ = ["DownloadError", "Entry", "entries", "find", "get", "get_checkpoint_url", "get_config", "get_config_file"]

register()


def get_config_file(name: str) -> str:
    """The path of the recipe for published weights, or of the recipe of that name. See :func:`get_config`.

    Raises:
        FileNotFoundError: neither exists.
    """
    name = name.removesuffix(".yaml")
    return find_config_file(entries()[name].recipe if name in entries() else name)


def get_checkpoint_url(name: str) -> str:
    """The value of `MODEL.WEIGHTS` for published weights.

    Raises:
        ValueError: no weights are published under that name.
    """
    return PREFIX + find(name).name


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of the published weights of that name, else the recipe of that name.

    Includes settings that the published weights need and the faithful recipe of the same name lacks.

    Args:
        trained: set `MODEL.WEIGHTS` to the published weights; otherwise it stays the recipe's, a backbone.

    Raises:
        FileNotFoundError: there is no recipe of that name.
        ValueError: `trained`, and no weights are published under that name.
    """
    settings = settings_of(name)
    if trained:  # timm need not fetch a backbone's weights then
        settings += ["MODEL.WEIGHTS", get_checkpoint_url(name), "MODEL.TIMM.PRETRAINED", False]
    return load_config(get_config_file(name), settings)


def settings_of(name: str) -> list:
    """KEY, VALUE, … that override the recipe for published weights; empty if there are no such weights."""
    entry = entries().get(name.removesuffix(".yaml"))
    return list(entry.settings) if entry else []


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build the model and load its weights. It is in training mode, as in detectron2's model zoo.

    Args:
        trained: load the published weights; otherwise the recipe's, a backbone.
        device: overrides the config's.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    DINOCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
