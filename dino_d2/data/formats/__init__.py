"""Find datasets in the layouts of COCO, Roboflow, YOLO and Pascal VOC, and convert them to `CocoFiles`."""

from .find import FoundDataset, find_dataset

__all__ = ["FoundDataset", "find_dataset"]
