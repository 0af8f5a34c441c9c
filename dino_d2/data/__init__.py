"""Image reading, augmentation, datasets and their inspection, and resumable data loaders."""

from .augmentation import build_test_augmentation, build_train_augmentation
from .coco import stream_results
from .datasets import CocoFiles, check_classes, class_names, load_config_for_files, read_coco, register_datasets
from .formats import FoundDataset, find_dataset
from .images import UnreadableImage, read_image, read_reduced
from .loader import TrainingLoader, build_test_loader, build_train_loader
from .mapper import ImageMapper
from .records import share_on_node

__all__ = [
    "CocoFiles",
    "FoundDataset",
    "ImageMapper",
    "TrainingLoader",
    "UnreadableImage",
    "build_test_augmentation",
    "build_test_loader",
    "build_train_augmentation",
    "build_train_loader",
    "check_classes",
    "class_names",
    "find_dataset",
    "load_config_for_files",
    "read_coco",
    "read_image",
    "read_reduced",
    "register_datasets",
    "share_on_node",
    "stream_results",
]
