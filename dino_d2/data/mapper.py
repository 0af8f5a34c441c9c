"""Map dataset records to model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from .annotations import boxes_of, check_annotations
from .images import read_image
from .mosaic import mosaic


class ImageMapper(DatasetMapper):
    """detectron2's `DatasetMapper` for boxes; errors name the image."""

    def __call__(self, dataset_dict: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """
        Args:
            dataset_dict: a record in detectron2's format; not modified.
            others: records that make a mosaic together with it.

        Returns:
            the record with "image" (3, H, W) uint8 and, in training, "instances" instead of "annotations".

        Raises:
            UnreadableImage: the image cannot be read.
            ValueError: its size differs from the record's, a box is not four numbers, or a category is not an integer.
        """
        record = dict(dataset_dict)
        pixels = self._read_and_check(record)
        if others:
            parts = [record, *map(dict, others)]
            images = [pixels, *(self._read_and_check(part) for part in parts[1:])]
            pixels, record["annotations"] = mosaic(images, [part["annotations"] for part in parts])
            record["height"], record["width"] = pixels.shape[:2]
        augmented = T.AugInput(pixels)
        transforms = self.augmentations(augmented)
        record["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, augmented.image.shape[:2])
        return record

    def _read_and_check(self, record: dict[str, Any]) -> np.ndarray:
        pixels = self.read(record)
        detection_utils.check_image_size(record, pixels)
        if self.is_train and "annotations" in record:
            check_annotations(record)
        return pixels

    def read(self, record: dict[str, Any]) -> np.ndarray:
        """The image of a record before any augmentation: (H, W, 3) uint8 in `INPUT.FORMAT`."""
        return read_image(record["file_name"], self.image_format)

    def _transform_annotations(
        self, record: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]
    ) -> None:
        """As detectron2's, for all boxes at once: with dozens of objects one by one takes as long as the image.

        detectron2 resizes boxes of whole numbers as integers, which moves them to the upper left.
        """
        if self.use_instance_mask or self.use_keypoint:
            record["annotations"] = [dict(annotation) for annotation in record["annotations"]]  # changed in place
            super()._transform_annotations(record, transforms, size)
            return
        objects = [annotation for annotation in record.pop("annotations") if not annotation.get("iscrowd", 0)]
        boxes = transforms.apply_box(boxes_of(objects)).clip(0, size[::-1] * 2)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([annotation["category_id"] for annotation in objects], dtype=torch.int64)
        record["instances"] = detection_utils.filter_empty_instances(instances)
