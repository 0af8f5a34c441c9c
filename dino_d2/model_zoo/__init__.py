"""Published DINO weights by name: detectron2's `model_zoo`, for this detector.

    model = model_zoo.get("dino_r50_4scale_12ep", trained=True)

`MODEL.WEIGHTS dino://NAME` is the same weights for everything that takes a config.
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
    """The path of the recipe of published weights, or of the recipe of that name. See :func:`get_config`.

    Raises:
        FileNotFoundError: there is neither.
    """
    name = name.removesuffix(".yaml")
    return find_config_file(entries()[name].recipe if name in entries() else name)


def get_checkpoint_url(name: str) -> str:
    """What `MODEL.WEIGHTS` has to be for published weights.

    Raises:
        ValueError: none are published by that name.
    """
    return PREFIX + find(name).name


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config that published weights of that name go with, else the recipe of that name.

    Published weights need settings that the faithful recipe of the same name does not have; they are applied.

    Args:
        trained: let `MODEL.WEIGHTS` be the published weights; otherwise it is the recipe's, a backbone's.

    Raises:
        FileNotFoundError: there is no recipe of that name.
        ValueError: `trained`, and no weights are published by that name.
    """
    settings = settings_of(name)
    if trained:  # timm need not fetch a backbone's weights then
        settings += ["MODEL.WEIGHTS", get_checkpoint_url(name), "MODEL.TIMM.PRETRAINED", False]
    return load_config(get_config_file(name), settings)


def settings_of(name: str) -> list:
    """KEY, VALUE, … that go over the recipe of published weights; none where there are no such weights."""
    entry = entries().get(name.removesuffix(".yaml"))
    return list(entry.settings) if entry else []


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """The model, in training mode as detectron2's.

    Args:
        trained: with the published weights; otherwise with the recipe's, those of a backbone.
        device: in place of the config's.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    DINOCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
