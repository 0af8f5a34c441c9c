"""Test-time augmentation: detect in several copies of an image, and merge what was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances

Detect = Callable[[Sequence[dict[str, Any]]], list[dict[str, Instances]]]


class TestTimeAugmentation:
    """One image in several sizes, each also flipped; one result.

    Merged by suppression within a class: of two detections that overlap more than `nms_threshold`, the one with the
    higher score stays. So every score is one that the model gave, and an object that shows at one size only keeps its
    own; averaging over the copies (weighted box fusion) would lower it. DINO finds an object once in each copy, so that
    what is dropped are mostly the other copies' boxes of it; the threshold is high to spare neighbours.

    Copies are looked at one by one: memory is that of the largest one, and none is padded.

    Args:
        make_copies: detectron2's, of `TEST.AUG`.
        nms_threshold: IoU.
        max_detections: of the merged result.
    """

    def __init__(self, make_copies: DatasetMapperTTA, nms_threshold: float, max_detections: int):
        if not make_copies.min_sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: give it a size, or set TEST.AUG.ENABLED to False")
        self.make_copies = make_copies
        self.nms_threshold, self.max_detections = nms_threshold, max_detections

    def __call__(self, detect: Detect, image: dict[str, Any]) -> dict[str, Instances]:
        """
        Args:
            detect: the model in evaluation, without augmentation.
            image: one input in detectron2's format, see :meth:`DINO.forward`.

        Returns:
            what `detect` returns for one image.
        """
        pixels = _as_bytes_if_exact(image["image"].cpu())
        height, width = image.get("height", pixels.shape[1]), image.get("width", pixels.shape[2])
        copies = self.make_copies({"image": pixels, "height": height, "width": width})
        found = []
        for copy in copies:
            (result,) = detect([{"image": copy["image"]}])  # without "height" and "width": in pixels of the copy
            boxes = result["instances"].pred_boxes.tensor
            there = copy["transforms"].inverse().apply_box(boxes.cpu().numpy())
            instances = Instances((height, width), **result["instances"].get_fields())
            instances.pred_boxes = Boxes(torch.from_numpy(there).to(boxes))
            instances.pred_boxes.clip((height, width))
            found.append(instances)
        return {"instances": self.merge(found)}

    def merge(self, found: Sequence[Instances]) -> Instances:
        """The detections of all copies, in the coordinates of one image: best first, without duplicates."""
        if len(found) == 1:
            return found[0]
        together = Instances.cat(list(found))
        boxes, scores, classes = together.pred_boxes.tensor, together.scores, together.pred_classes
        best_first = batched_nms(boxes, scores, classes, self.nms_threshold)
        return together[best_first[: self.max_detections]]


def build_test_time_augmentation(cfg: CfgNode) -> TestTimeAugmentation | None:
    """That of `TEST.AUG`, or None if it is not enabled.

    Raises:
        ValueError: there are no sizes, or `TEST.QUERY_METRICS` is to measure several passes as one.
    """
    if not cfg.TEST.AUG.ENABLED:
        return None
    if cfg.TEST.QUERY_METRICS:
        raise ValueError(
            "TEST.QUERY_METRICS measures the queries of one pass, TEST.AUG.ENABLED makes several: switch one off"
        )
    if cfg.INPUT.MIN_SIZE_TEST > 0:
        logging.getLogger(__name__).warning(
            "TEST.AUG resizes images that INPUT.MIN_SIZE_TEST %d has resized before; INPUT.MIN_SIZE_TEST 0 leaves "
            "them as they are until then, which is sharper",
            cfg.INPUT.MIN_SIZE_TEST,
        )
    return TestTimeAugmentation(DatasetMapperTTA(cfg), cfg.TEST.AUG.NMS_THRESHOLD, cfg.TEST.DETECTIONS_PER_IMAGE)


def _as_bytes_if_exact(image: torch.Tensor) -> torch.Tensor:
    """As uint8 if nothing is lost: detectron2 shrinks bytes with a filter, and floats without one."""
    as_bytes = image.to(torch.uint8)
    return as_bytes if torch.equal(as_bytes.to(image.dtype), image) else image
