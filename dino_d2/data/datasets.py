"""Data sets in COCO's format, named in the config or given as files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dino_d2.config import load_config

TRAIN_NAME, VAL_NAME = "own_train", "own_val"  # of data sets that are given as files


@dataclass(frozen=True)
class CocoFiles:
    """A data set in COCO's format: the annotation file, and the folder that its `file_name`s are relative to."""

    annotations: Path
    images: Path


def register_datasets(cfg: CfgNode) -> None:
    """Register every (name, annotation file, image folder) of `DATASETS.COCO_FORMAT` with detectron2.

    Registering the same data set again changes nothing.

    Raises:
        ValueError: an entry is no such triple, or its name is taken.
        FileNotFoundError: the annotation file or the image folder does not exist.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if len(entry) != 3:
            raise ValueError(f"DATASETS.COCO_FORMAT: {entry} must be [name, annotation file, image folder]")
        name, annotations, images = entry
        for path in (annotations, images):
            if not Path(path).exists():
                raise FileNotFoundError(f"DATASETS.COCO_FORMAT: {path} of the data set {name!r} does not exist")
        if name in DatasetCatalog:
            if _REGISTERED.get(name) == (annotations, images):
                continue
            raise ValueError(f"DATASETS.COCO_FORMAT: {name!r} is the name of another data set; choose a new one")
        register_coco_instances(name, {}, annotations, images)
        _REGISTERED[name] = (annotations, images)


_REGISTERED: dict[str, tuple[str, str]] = {}


def load_config_for_files(
    config_file: str, overrides: Sequence[str], train: CocoFiles | None, val: CocoFiles | None
) -> CfgNode:
    """The config of `dino_d2.load_config`, with the data sets of these files and with their classes.

    The files become entries of `DATASETS.COCO_FORMAT` (see :func:`register_datasets`) and take the place of
    `DATASETS.TRAIN` (which stays without `train`) and `DATASETS.TEST`. `MODEL.DINO.NUM_CLASSES` and `CLASS_NAMES` come
    from them, in order of category id, as detectron2 numbers classes; the config file and `overrides` may repeat them
    but not say otherwise. Without `val` nothing is evaluated. Without either it is `load_config`.

    Raises:
        FileNotFoundError: an annotation file or image folder does not exist.
        ValueError: an annotation file is not COCO's format; the two have different categories, or the config has
            different classes; `overrides` name other data sets.
    """
    given = {TRAIN_NAME: train, VAL_NAME: val}
    given = {name: files for name, files in given.items() if files is not None}
    if not given:
        return load_config(config_file, overrides)
    for key in overrides[::2]:
        if key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            raise ValueError(f"{key} is given beside annotation files, which take its place: leave one of the two out")

    names = _common_class_names(list(given.values()))
    # As defaults, so that whatever differs afterwards was said by the config file or the overrides.
    classes = ["MODEL.DINO.NUM_CLASSES", len(names), "MODEL.DINO.CLASS_NAMES", names]
    cfg = load_config(config_file, overrides, defaults=classes)
    cfg.MODEL.DINO.CLASS_NAMES = cfg.MODEL.DINO.CLASS_NAMES or names
    for key, ours, theirs in (
        ("NUM_CLASSES", cfg.MODEL.DINO.NUM_CLASSES, len(names)),
        ("CLASS_NAMES", list(cfg.MODEL.DINO.CLASS_NAMES), names),
    ):
        if ours != theirs:
            source = next(iter(given.values())).annotations
            raise ValueError(
                f"MODEL.DINO.{key} is {ours} in the config, but the categories of {source} make it {theirs}: "
                f"leave the key out of the config file and the command, or correct the file"
            )

    entries = [entry for entry in cfg.DATASETS.COCO_FORMAT if entry[0] not in given]
    entries += [[name, str(files.annotations), str(files.images)] for name, files in given.items()]
    cfg.DATASETS.COCO_FORMAT = entries
    if train:
        cfg.DATASETS.TRAIN = (TRAIN_NAME,)
    cfg.DATASETS.TEST = (VAL_NAME,) if val else ()
    if not val:
        cfg.TEST.EVAL_PERIOD = 0
    return cfg


def read_coco(annotations: Path) -> dict[str, list[dict[str, Any]]]:
    """The "images", "annotations" and "categories" of a file in COCO's format.

    Of their entries only the categories are checked: each has a number of its own and a name, and there is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not COCO's format.
    """
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations}: there is no such annotation file")
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{annotations} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f'{annotations} is not in COCO\'s format: it has no list of objects named "{key}"')
    categories = content["categories"]
    if not categories:
        raise ValueError(f'{annotations}: "categories" is empty; it must hold an id and a name for each class')
    for category in categories:
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise ValueError(f'{annotations}: the category {category} needs an "id", an integer, and a "name", a text')
    twice = [number for number, count in Counter(c["id"] for c in categories).items() if count > 1]
    if twice:
        raise ValueError(f"{annotations}: several categories have the id {twice[0]}; give each its own")
    return content


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes: the config's, else those of its first data set; empty where neither has them."""
    if cfg.MODEL.DINO.CLASS_NAMES:
        return list(cfg.MODEL.DINO.CLASS_NAMES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        entries = [entry for entry in cfg.DATASETS.COCO_FORMAT if entry[0] == name]
        if entries and Path(entries[0][1]).is_file():
            return _class_names_of(Path(entries[0][1]))
        if not entries and name in MetadataCatalog.list():
            return list(MetadataCatalog.get(name).get("thing_classes", []))
    return []


def _class_names_of(annotations: Path) -> list[str]:
    return [category["name"] for category in sorted(read_coco(annotations)["categories"], key=lambda c: c["id"])]


def _common_class_names(data: Sequence[CocoFiles]) -> list[str]:
    for files in data:
        if not files.images.is_dir():
            raise FileNotFoundError(f"{files.images}: there is no such image folder (of {files.annotations})")
    names = _class_names_of(data[0].annotations)
    for files in data[1:]:
        others = _class_names_of(files.annotations)
        if others == names:
            continue
        differing = sorted(set(names) ^ set(others))
        what = (
            f"{', '.join(differing)} {'is' if len(differing) == 1 else 'are'} in one of them only"
            if differing
            else f"by id they are {', '.join(names)} in the one and {', '.join(others)} in the other"
        )
        raise ValueError(
            f"{data[0].annotations} and {files.annotations} have different categories: {what}. "
            f'Write the same "categories" into both files'
        )
    return names
