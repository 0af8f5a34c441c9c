"""Map dataset records to model inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from .augmentation import ResizingAugmentation
from .images import read_reduced
from .mosaic import mosaic

MODES = [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS]  # in pixels


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
            # Copies, since detectron2 changes them; floats, since it resizes whole numbers as integers, which moves
            # boxes to the upper left.
            record["annotations"] = [x | {"bbox": [float(side) for side in x["bbox"]]} for x in record["annotations"]]
            self._transform_annotations(record, transforms, augmented.image.shape[:2])
        return record

    def _read_and_check(self, record: dict[str, Any]) -> np.ndarray:
        """The pixels. If they are fewer than the file has, size and boxes of the record are changed."""
        pixels, (height, width) = self.read(record)
        whole = np.broadcast_to(np.uint8(), (height, width))  # only its shape is looked at
        detection_utils.check_image_size(record, whole)
        if self.is_train and "annotations" in record:
            check_annotations(record)
        if pixels.shape[:2] != (height, width):
            record["height"], record["width"] = pixels.shape[:2]
            if "annotations" in record:
                scale = np.array([record["width"] / width, record["height"] / height] * 2)
                record["annotations"] = [x | {"bbox": (scale * x["bbox"]).tolist()} for x in record["annotations"]]
        return pixels

    def read(self, record: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
        """The image of a record before any augmentation, (h, w, channels) uint8 in `INPUT.FORMAT`, and height and width
        that it has in the file.

        In training, large photographs are read smaller if the augmentations make them smaller anyway.
        """
        return read_reduced(record["file_name"], self.image_format, self._shorter_side())

    def _shorter_side(self) -> int | None:
        """Shorter side of images in pixels that is enough; None: they are needed as they are."""
        augmentation = self.augmentations.augs[0] if self.augmentations.augs else None
        if not self.is_train or self.use_instance_mask or self.use_keypoint:  # these are not scaled
            return None
        return augmentation.shorter_side if isinstance(augmentation, ResizingAugmentation) else None


def check_annotations(record: dict[str, Any]) -> None:
    """Reject annotations that would be learned wrongly or fail with an unclear error.

    Raises:
        ValueError: names the image, the annotation and the value.
    """
    for number, annotation in enumerate(record["annotations"], start=1):
        box, category = annotation.get("bbox"), annotation.get("category_id")
        where = f"{record['file_name']}, annotation {number}"
        is_list = isinstance(box, list | tuple | np.ndarray) and len(box) == 4
        if not is_list or not all(isinstance(side, Real) and math.isfinite(side) for side in box):
            raise ValueError(f'{where}: "bbox" is {box!r}; it must be a list of four numbers')
        if annotation.get("bbox_mode") not in MODES:
            raise ValueError(f'{where}: "bbox_mode" is {annotation.get("bbox_mode")!r}; it must be one of {MODES}')
        if not isinstance(category, Integral):
            raise ValueError(f'{where}: "category_id" is {category!r}; it must be an integer')
