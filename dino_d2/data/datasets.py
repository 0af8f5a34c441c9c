"""Datasets in COCO format, named in the config or given as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.utils.file_io import PathManager

from dino_d2.config import load_config
from dino_d2.digest import sha256_of

from .coco import CocoRecords, has_byte_order_mark, stream_lists

TRAIN_NAME, VAL_NAME = "own_train", "own_val"  # of datasets given as files
DETECTRON2_COCO = builtin._PREDEFINED_SPLITS_COCO["coco"]  # names of the datasets registered by detectron2


@dataclass(frozen=True)
class CocoFiles:
    """A dataset in COCO format: the annotation file, and the folder that its `file_name`s are relative to."""

    annotations: Path
    images: Path


def register_datasets(cfg: CfgNode, used: Collection[str] | None = None) -> None:
    """Register every (name, annotation file, image folder) of `DATASETS.COCO_FORMAT` with detectron2.

    Their records hold only boxes (:class:`CocoRecords`), and so do those of detectron2's COCO datasets in the config
    afterwards. Registering the same dataset again has no effect.

    Args:
        used: names of the datasets that are needed; others may be missing, such as those that weights were trained
            with. None: all.

    Raises:
        ValueError: an entry is not such a triple, its name is taken, or evaluation cannot read its file.
        FileNotFoundError: the annotation file or the image folder of a dataset that is needed does not exist.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if len(entry) != 3:
            raise ValueError(f"DATASETS.COCO_FORMAT: {entry} must be [name, annotation file, image folder]")
        name, annotations, images = entry
        missing = [path for path in (annotations, images) if not Path(path).exists()]
        if missing and used is not None and name not in used:
            continue
        if missing:
            raise FileNotFoundError(f"DATASETS.COCO_FORMAT: {missing[0]} of the dataset {name!r} does not exist")
        if name in cfg.DATASETS.TEST and has_byte_order_mark(annotations):
            raise ValueError(f"{annotations} begins with a byte order mark, which evaluation cannot read: remove it")
        if name in DatasetCatalog:
            if _REGISTERED.get(name) == (annotations, images):
                continue
            if name not in (TRAIN_NAME, VAL_NAME):
                raise ValueError(f"DATASETS.COCO_FORMAT: {name!r} is the name of another dataset; choose a new one")
            DatasetCatalog.remove(name)  # an earlier run in this process had other files
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(CocoRecords, annotations, images, name))
        MetadataCatalog.get(name).set(json_file=annotations, image_root=images, evaluator_type="coco")
        _REGISTERED[name] = (annotations, images)
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} & set(DETECTRON2_COCO):
        metadata = MetadataCatalog.get(name)
        DatasetCatalog[name] = partial(CocoRecords, metadata.json_file, metadata.image_root, name)


_REGISTERED: dict[str, tuple[str, str]] = {}


def load_config_for_files(
    config_file: str, overrides: Sequence[str], train: CocoFiles | None, val: CocoFiles | None
) -> CfgNode:
    """`dino_d2.load_config`, with these files as datasets and with their classes.

    The files become entries of `DATASETS.COCO_FORMAT` (see :func:`register_datasets`) and replace `DATASETS.TRAIN` (if
    `train` is given) and `DATASETS.TEST`. `MODEL.DINO.NUM_CLASSES` and `CLASS_NAMES` are taken from them, in order of
    category id as in detectron2; the config file and `overrides` may repeat but not contradict them. Without `val`
    nothing is evaluated. Without both it is `load_config`.

    Raises:
        FileNotFoundError: an annotation file or image folder does not exist.
        ValueError: an annotation file is not in COCO format; the files have different categories, or the config has
            different classes; `overrides` set datasets too.
    """
    given = {TRAIN_NAME: train, VAL_NAME: val}
    given = {name: files for name, files in given.items() if files is not None}
    if not given:
        return load_config(config_file, overrides)
    for key in overrides[::2]:
        if key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            raise ValueError(f"{key} conflicts with the annotation files, which replace it: give only one of them")

    names = _common_class_names(train, val)
    # As defaults, so that any difference afterwards comes from the config file or the overrides.
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
                f"MODEL.DINO.{key} is {ours} in the config, but {theirs} according to the categories of {source}: "
                f"remove the key from the config file and the command, or correct the file"
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
    """The "images", "annotations" and "categories" of a file in COCO format.

    Of the entries only categories are checked: there is at least one, and each has a unique id and a name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON, or not in COCO format.
    """
    names = ("images", "annotations", "categories")
    content = {name: list(entries) for name, entries in _lists_of(annotations) if name in names}
    for name in names:
        if not all(isinstance(entry, dict) for entry in content.get(name, [None])):
            raise _not_coco(annotations, name)
    _check_categories(annotations, content["categories"])
    return content


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes: the config's, else those of its first dataset; empty if unknown."""
    if cfg.MODEL.DINO.CLASS_NAMES:
        return list(cfg.MODEL.DINO.CLASS_NAMES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = _names_in(cfg, name)
        if names is not None:
            return names
    return []


def check_classes(cfg: CfgNode, datasets: Iterable[str]) -> None:
    """Compare the classes of the config with those of the datasets, where known.

    Raises:
        ValueError: their number, names or order differ; the message gives both.
    """
    number, names = cfg.MODEL.DINO.NUM_CLASSES, list(cfg.MODEL.DINO.CLASS_NAMES)
    for dataset in datasets:
        loaded = MetadataCatalog.get(dataset).get("thing_classes") if dataset in MetadataCatalog.list() else None
        theirs = loaded or _names_in(cfg, dataset)
        if not theirs:
            continue
        if len(theirs) != number:
            raise ValueError(
                f"MODEL.DINO.NUM_CLASSES is {number}, but the dataset {dataset} has {len(theirs)} categories "
                f"({_some(theirs)}): set it to {len(theirs)}, or use data with the model's classes"
            )
        if names and names != list(theirs):
            pairs = enumerate(zip_longest(names, theirs, fillvalue="no class"))
            place, ours, other = next((i, *pair) for i, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"MODEL.DINO.CLASS_NAMES and the categories of the dataset {dataset} differ: class {place} is "
                f"{ours!r} in the config and {other!r} in the data (classes are numbered in order of "
                f"category id). Config: {_some(names)}. Data: {_some(theirs)}. Correct CLASS_NAMES, or the categories "
                f"of the file"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _names_in(cfg: CfgNode, dataset: str) -> list[str] | None:
    """A dataset's classes, without loading it; None for an unknown dataset, empty if its classes are unknown."""
    entries = [entry for entry in cfg.DATASETS.COCO_FORMAT if entry[0] == dataset]
    if entries:
        return class_names_of(Path(entries[0][1])) if Path(entries[0][1]).is_file() else None
    if dataset not in MetadataCatalog.list():
        return None
    known = MetadataCatalog.get(dataset)
    if "thing_classes" not in known.as_dict() and known.get("evaluator_type") == "coco":  # register_coco_instances
        file = Path(known.get("json_file", ""))
        return class_names_of(file) if file.is_file() else None
    return list(known.get("thing_classes", []))


def class_names_of(annotations: Path) -> list[str]:
    """Category names of a file in COCO format, in order of their ids.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_coco`.
    """
    return list(_file_outline(annotations)[1])


def fingerprints(datasets: Iterable[str]) -> dict[str, dict[str, Any]]:
    """For each registered dataset with an annotation file in COCO format: its number of "images", and the file's
    "sha256", which does not depend on where the file and the images are.

    Raises:
        ValueError: a file is not JSON.
    """
    files = {name: MetadataCatalog.get(name).get("json_file") for name in datasets if name in MetadataCatalog.list()}
    return {
        name: {"images": _number_of_images(path), "sha256": sha256_of(path)}
        for name, path in files.items()
        if path and PathManager.isfile(path)
    }


def _number_of_images(path: str) -> int:
    return next((sum(1 for _ in entries) for name, entries in stream_lists(path) if name == "images"), 0)


def _file_outline(annotations: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the lists in a file in COCO format, and of its classes in order of their ids."""
    state = annotations.stat() if annotations.is_file() else None
    return _outline(annotations, (state.st_mtime_ns, state.st_size) if state else None)


@lru_cache
def _outline(annotations: Path, state: Hashable) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found, categories = [], []
    for name, entries in _lists_of(annotations):
        found.append(name)
        if name == "categories":
            categories = list(entries)
    for name in ("images", "categories"):
        if name not in found:
            raise _not_coco(annotations, name)
    _check_categories(annotations, categories)
    return tuple(found), tuple(category["name"] for category in sorted(categories, key=lambda c: c["id"]))


def _lists_of(annotations: Path) -> Iterator[tuple[str, Iterator[Any]]]:
    if not annotations.is_file():
        raise FileNotFoundError(f"annotation file {annotations} does not exist")
    return stream_lists(str(annotations))


def _not_coco(annotations: Path, name: str) -> ValueError:
    return ValueError(f'{annotations} is not in COCO format: it has no list of objects named "{name}"')


def _check_categories(annotations: Path, categories: Sequence[dict[str, Any]]) -> None:
    if not categories:
        raise ValueError(f'{annotations}: "categories" is empty; it must hold an id and a name for each class')
    for category in categories:
        if not isinstance(category, dict):
            raise _not_coco(annotations, "categories")
        if type(category.get("id")) is not int or not isinstance(category.get("name"), str):
            raise ValueError(f'{annotations}: the category {category} needs an integer "id" and a string "name"')
    repeated = [number for number, count in Counter(c["id"] for c in categories).items() if count > 1]
    if repeated:
        raise ValueError(f"{annotations}: several categories have the id {repeated[0]}; give each a different one")


def _common_class_names(train: CocoFiles | None, val: CocoFiles | None) -> list[str]:
    data = [files for files in (train, val) if files is not None]
    for files in data:
        if not files.images.is_dir():
            raise FileNotFoundError(f"image folder {files.images} (of {files.annotations}) does not exist")
    names = class_names_of(data[0].annotations)
    if train and "annotations" not in _file_outline(train.annotations)[0]:
        raise _not_coco(train.annotations, "annotations")
    for files in data[1:]:
        others = class_names_of(files.annotations)
        if others == names:
            continue
        differing = sorted(set(names) ^ set(others))
        what = (
            f"only one of them has {', '.join(differing)}"
            if differing
            else f"in order of id they are {', '.join(names)} in the first and {', '.join(others)} in the second"
        )
        raise ValueError(
            f"{data[0].annotations} and {files.annotations} have different categories: {what}. "
            f'Write the same "categories" into both files'
        )
    return names
