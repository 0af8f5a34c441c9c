"""Reading and augmentation of pictures, data set registration; loading is detectron2's."""

from .augmentation import build_test_augmentation, build_train_augmentation
from .datasets import class_names, register_datasets
from .images import read_image
from .mapper import ImageMapper

__all__ = [
    "ImageMapper",
    "build_test_augmentation",
    "build_train_augmentation",
    "class_names",
    "read_image",
    "register_datasets",
]
