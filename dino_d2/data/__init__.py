"""Augmentation and data set registration; loading is detectron2's."""

from .augmentation import build_train_augmentation
from .datasets import class_names, register_datasets

__all__ = ["build_train_augmentation", "class_names", "register_datasets"]
