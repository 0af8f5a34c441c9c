"""Data sets in COCO's format, named in the config."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances


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


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes: the config's, else those of its first data set; empty where neither has them."""
    if cfg.MODEL.DINO.CLASS_NAMES:
        return list(cfg.MODEL.DINO.CLASS_NAMES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        entries = [entry for entry in cfg.DATASETS.COCO_FORMAT if entry[0] == name]
        if entries and Path(entries[0][1]).is_file():
            categories = json.loads(Path(entries[0][1]).read_text())["categories"]
            return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]
        if not entries and name in MetadataCatalog.list():
            return list(MetadataCatalog.get(name).get("thing_classes", []))
    return []
