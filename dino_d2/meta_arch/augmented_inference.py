"""Test-time augmentation: detect objects in several copies of an image and merge the detections."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances

from .duplicates import agreed_scores, vote

SIZES_AROUND = (0.9, 1.0, 1.1)  # of the test size; what they bring: docs/few_photos.md

Detect = Callable[[Sequence[dict[str, Any]]], list[dict[str, Instances]]]


class TestTimeAugmentation:
    """Runs the model on an image in several sizes, each optionally flipped, and merges the detections.

    Merging is per-class NMS with `nms_threshold`. This keeps the model's scores even for objects found at a single
    size, which averaging over copies (weighted box fusion) would lower. DINO finds an object once per copy, so NMS
    mostly removes the other copies' boxes; the threshold is high to spare neighbouring objects. A model that drops
    duplicates itself does so with its own threshold, if that is lower. One that averages their boxes averages those of
    all copies before, and its scores tell how many copies agree.

    Copies are processed one by one: this needs memory for the largest only, and no padding.

    Args:
        make_copies: detectron2's mapper for `TEST.AUG`.
        nms_threshold: IoU.
        box_voting: average the boxes around the same object, and its scores, as `agreed_scores`.
        max_detections: in the merged result.
    """

    def __init__(self, make_copies: DatasetMapperTTA, nms_threshold: float, box_voting: bool, max_detections: int):
        if not make_copies.min_sizes:
            raise ValueError("TEST.AUG.MIN_SIZES is empty: add a size, or set TEST.AUG.ENABLED to False")
        self.make_copies = make_copies
        self.nms_threshold, self.box_voting, self.max_detections = nms_threshold, box_voting, max_detections

    def __call__(self, detect: Detect, image: dict[str, Any]) -> dict[str, Instances]:
        """
        Args:
            detect: the model without augmentation, in evaluation mode.
            image: one input in detectron2's format, see :meth:`DINO.forward`.

        Returns:
            the output of `detect` for one image.
        """
        pixels = _as_bytes_if_exact(image["image"].cpu())
        height, width = image.get("height", pixels.shape[1]), image.get("width", pixels.shape[2])
        copies = self.make_copies({"image": pixels, "height": height, "width": width})
        found = []
        for copy in copies:
            (result,) = detect([{"image": copy["image"]}])  # no "height", "width": boxes in pixels of the copy
            boxes = result["instances"].pred_boxes.tensor
            original_boxes = copy["transforms"].inverse().apply_box(boxes.cpu().numpy())
            instances = Instances((height, width), **result["instances"].get_fields())
            instances.pred_boxes = Boxes(torch.from_numpy(original_boxes).to(boxes))
            instances.pred_boxes.clip((height, width))
            found.append(instances)
        return {"instances": self.merge(found)}

    def merge(self, found: Sequence[Instances]) -> Instances:
        """Merge the detections of all copies, in common coordinates: highest score first, without duplicates."""
        if len(found) == 1:
            return found[0]
        together = Instances.cat(list(found))
        boxes, scores, classes = together.pred_boxes.tensor, together.scores, together.pred_classes
        if self.box_voting:
            together.scores = agreed_scores(boxes, scores, classes, [len(x) for x in found], self.nms_threshold)
            boxes = vote(boxes[None], scores[None], classes[None], self.nms_threshold)[0]
            together.pred_boxes = Boxes(boxes)
        # detectron2 makes the boxes float32, and torchvision wants one dtype
        best_first = batched_nms(boxes, together.scores.float(), classes, self.nms_threshold)
        return together[best_first[: self.max_detections]]


def build_test_time_augmentation(cfg: CfgNode) -> TestTimeAugmentation | None:
    """Build test-time augmentation from `TEST.AUG`; None if it is disabled.

    Raises:
        ValueError: no sizes are given, or `TEST.QUERY_METRICS` is enabled, which needs a single pass.
    """
    if not cfg.TEST.AUG.ENABLED:
        return None
    if cfg.TEST.QUERY_METRICS:
        raise ValueError(
            "TEST.QUERY_METRICS measures a single pass, TEST.AUG.ENABLED makes several: disable one of them"
        )
    if cfg.INPUT.MIN_SIZE_TEST > 0:
        logging.getLogger(__name__).warning(
            "TEST.AUG resizes images already resized to INPUT.MIN_SIZE_TEST %d; set INPUT.MIN_SIZE_TEST 0 to resize "
            "only once, which is sharper",
            cfg.INPUT.MIN_SIZE_TEST,
        )
    of_model = cfg.MODEL.DINO.NMS_THRESHOLD
    voting = cfg.MODEL.DINO.BOX_VOTING and of_model < 1  # as in a single pass
    threshold = min(cfg.TEST.AUG.NMS_THRESHOLD, of_model)
    return TestTimeAugmentation(DatasetMapperTTA(cfg), threshold, voting, cfg.TEST.DETECTIONS_PER_IMAGE)


def augmentation_keys(cfg: CfgNode) -> dict[str, Any]:
    """Config values for test-time augmentation: sizes around `INPUT.MIN_SIZE_TEST`, also flipped if training flips
    images."""
    size = cfg.INPUT.MIN_SIZE_TEST
    return {
        "TEST.AUG.ENABLED": True,
        "TEST.AUG.MIN_SIZES": tuple(round(factor * size) for factor in SIZES_AROUND) if size else (0,),
        "TEST.AUG.MAX_SIZE": round(max(SIZES_AROUND) * cfg.INPUT.MAX_SIZE_TEST),
        "TEST.AUG.FLIP": cfg.INPUT.RANDOM_FLIP == "horizontal",
        "INPUT.MIN_SIZE_TEST": 0,
        "TEST.QUERY_METRICS": False,  # of a single pass
    }


def _as_bytes_if_exact(image: torch.Tensor) -> torch.Tensor:
    """Convert to uint8 if lossless: detectron2 filters when shrinking bytes, but not floats."""
    as_bytes = image.to(torch.uint8)
    return as_bytes if torch.equal(as_bytes.to(image.dtype), image) else image
