"""Reading and augmentation of pictures, data set registration and inspection; loading is detectron2's."""

from .augmentation import build_test_augmentation, build_train_augmentation
from .datasets import CocoFiles, class_names, load_config_for_files, read_coco, register_datasets
from .images import read_image
from .mapper import ImageMapper

__all__ = [
    "CocoFiles",
    "ImageMapper",
    "build_test_augmentation",
    "build_train_augmentation",
    "class_names",
    "load_config_for_files",
    "read_coco",
    "read_image",
    "register_datasets",
]
