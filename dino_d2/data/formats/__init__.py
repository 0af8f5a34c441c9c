"""What is in a folder: datasets as COCO, Roboflow, YOLO and Pascal VOC lay them out, made into `CocoFiles`."""

from .find import FoundDataset, find_dataset

__all__ = ["FoundDataset", "find_dataset"]
