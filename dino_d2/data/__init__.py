"""Augmentation, data set registration and inspection; loading is detectron2's."""

from .augmentation import build_train_augmentation
from .datasets import CocoFiles, class_names, load_config_for_files, read_coco, register_datasets

__all__ = [
    "CocoFiles",
    "build_train_augmentation",
    "class_names",
    "load_config_for_files",
    "read_coco",
    "register_datasets",
]
