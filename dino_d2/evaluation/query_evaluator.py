"""The paper's query metrics on a dataset: anchor distances, duplicates, and AP per decoder layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_d2.geometry import xyxy_to_cxcywh
from dino_d2.structures import Targets

from .atd import average_top_k_distance
from .build import evaluator_type
from .coco import COCOEvaluator
from .lvis import LVISEvaluator
from .recorder import DecoderRecorder
from .settings import APSettings

logger = logging.getLogger(__name__)

DUPLICATE_IOU = 0.5  # COCO's lowest IoU threshold
SMALL_AREA = 32**2  # pixels; COCO's upper limit for small objects


@dataclass
class _Batch:
    """Data of one batch for the results, on the CPU.

    boxes, anchors: (M, 4) matched pairs, cx, cy, w, h in [0, 1].
    areas: (M,) areas of those objects in pixels.
    image_ids: of the B images.
    objects: of each image, with `gt_boxes` and `gt_classes`.
    detections: B Instances for each layer.
    """

    boxes: Tensor
    anchors: Tensor
    areas: Tensor
    image_ids: list[int | str]
    objects: list[Instances]
    detections: list[list[Instances]]


class QueryEvaluator(DatasetEvaluator):
    """Measures query metrics beyond AP; docs/evaluation.md explains them.

    Objects are those of the registered dataset, without crowds and empty boxes. A hook on the decoder, active from
    `reset` to `evaluate`, records its outputs without changing them.

    Args:
        dataset_name: registered with detectron2. If it has no annotation file in a known format, create a
            `COCOEvaluator` first: that writes the annotation file for the AP of the layers.
        model: the evaluated DINO, or its DistributedDataParallel.
        k: for the average top-k distance; 100 in the paper.
        settings: for the AP of the layers.

    Raises:
        TypeError: the model has no decoder.
        ValueError: an image of the dataset has no "image_id", or the model uses test-time augmentation.
    """

    def __init__(
        self,
        dataset_name: str,
        model: nn.Module,
        k: int = 100,
        settings: APSettings | None = None,
    ):
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        if not hasattr(self._model, "decoder"):
            raise TypeError(
                f"{type(self._model).__name__} has no decoder: set TEST.QUERY_METRICS to False for models other than "
                "DINO"
            )
        if self._model.inference.test_time_augmentation is not None:
            raise ValueError(
                "TEST.QUERY_METRICS measures a single pass, TEST.AUG.ENABLED makes several: disable one of them"
            )
        self._dataset_name = dataset_name
        self._k = k
        self._recorder = DecoderRecorder(self._model.decoder)
        self._objects = {_image_id(record): _boxes_and_classes(record) for record in DatasetCatalog.get(dataset_name)}
        # Reused for one layer after the other; batches are already gathered.
        self._layer_evaluator = _layer_evaluator(dataset_name, settings)
        self._batches: list[_Batch] = []

    def reset(self) -> None:
        self._batches = []
        self._recorder.attach()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Instances]]) -> None:
        """See :meth:`DatasetEvaluator.process`; the model's last call must have been on `inputs`."""
        queries, layers = self._recorder.pop()
        last = layers[-1]
        objects = [self._objects_in(x, num_classes=last.logits.shape[-1]) for x in inputs]

        targets = [_targets(image_objects, last.boxes.device) for image_objects in objects]
        (pairs,) = self._model.criterion.matcher([last], targets)
        areas = torch.cat([image_objects.gt_boxes.area() for image_objects in objects])

        sizes = [tuple(x["image"].shape[-2:]) for x in inputs]
        by_layer = [*(self._model.postprocess(layer, inputs, sizes) for layer in layers[:-1]), outputs]
        detections = [[result["instances"].to("cpu") for result in results] for results in by_layer]

        self._batches.append(
            _Batch(
                boxes=torch.cat([target.boxes for target in targets])[pairs.target].cpu(),
                anchors=queries.anchors[pairs.image, pairs.query].cpu(),
                areas=areas[pairs.target.cpu()],
                image_ids=[_image_id(x) for x in inputs],
                objects=objects,
                detections=detections,
            )
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the metrics over all processes.

        Returns:
            {"queries": {"ATD100", "ATD100s", "duplicates", "AP_layer1", … "AP_layerN"}} in the main process, {} in the
            others. The APs are COCO's or LVIS's according to the dataset; missing for other datasets or without
            annotations.
        """
        self._recorder.detach()
        comm.synchronize()
        batches = list(chain(*comm.gather(self._batches)))
        if not comm.is_main_process() or not batches:
            return {}
        boxes, anchors, areas = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("boxes", "anchors", "areas")
        )
        small = areas < SMALL_AREA
        results = {
            f"ATD{self._k}": average_top_k_distance(boxes, anchors, self._k).item(),
            f"ATD{self._k}s": average_top_k_distance(boxes[small], anchors[small], self._k).item(),
            "duplicates": _duplicates(
                [found for batch in batches for found in batch.detections[-1]],
                [objects for batch in batches for objects in batch.objects],
            ),
        }
        if self._layer_evaluator is not None:
            for layer in range(len(batches[0].detections)):
                results |= self._average_precision(self._layer_evaluator, batches, layer)
        return {"queries": results}

    @staticmethod
    def _average_precision(evaluator: DatasetEvaluator, batches: Sequence[_Batch], layer: int) -> dict[str, float]:
        logger.info("Average precision after decoder layer %d:", layer + 1)
        evaluator.reset()
        for batch in batches:
            inputs = [{"image_id": image_id} for image_id in batch.image_ids]
            outputs = [{"instances": instances} for instances in batch.detections[layer]]
            evaluator.process(inputs, outputs)
        results = evaluator.evaluate()
        return {f"AP_layer{layer + 1}": results["bbox"]["AP"]} if "bbox" in results else {}

    def _objects_in(self, x: dict[str, Any], num_classes: int) -> Instances:
        """The objects of one input, in pixels of the original image."""
        image_id = _image_id(x)
        if image_id not in self._objects:
            raise ValueError(
                f"Image {image_id} is not in the dataset {self._dataset_name!r}: evaluator and loader must use the "
                "same dataset"
            )
        boxes, classes = self._objects[image_id]
        if len(classes) and int(classes.max()) >= num_classes:
            raise ValueError(
                f"Image {image_id} of {self._dataset_name!r} has an object of class {int(classes.max())}, but the "
                f"model predicts {num_classes} classes: MODEL.DINO.NUM_CLASSES and the dataset must agree"
            )
        objects = Instances((x["height"], x["width"]), gt_boxes=boxes.clone(), gt_classes=classes)
        objects.gt_boxes.clip(objects.image_size)
        return objects[objects.gt_boxes.nonempty()]


def predictions_per_object(predictions: Instances, objects: Instances) -> Tensor:
    """Number of predictions on each object: of the same class, with IoU of at least 0.5.

    Each prediction counts for one object, the one of its class with the largest IoU.

    Args:
        predictions: m, with `pred_boxes` and `pred_classes`.
        objects: n, with `gt_boxes` and `gt_classes`.

    Returns:
        (n,) int64; its sum is at most m.
    """
    if not len(objects):
        return torch.zeros(0, dtype=torch.int64)
    same_class = predictions.pred_classes[:, None] == objects.gt_classes[None]
    overlap = pairwise_iou(predictions.pred_boxes, objects.gt_boxes) * same_class
    overlap, nearest = overlap.max(dim=1)
    return nearest[overlap >= DUPLICATE_IOU].bincount(minlength=len(objects))


def _duplicates(predictions: Sequence[Instances], objects: Sequence[Instances]) -> float:
    """Mean, over the objects that are found, of how many predictions too many they have.

    As many predictions count as the data set has objects, the best of all images: only the order of scores matters.

    Args:
        predictions, objects: of each image.
    """
    scores = torch.cat([found.scores for found in predictions])
    count = min(len(scores), sum(map(len, objects)))
    if not count:
        return float("nan")
    least = scores.topk(count).values[-1]
    best = [found[found.scores >= least] for found in predictions]
    hits = torch.cat([predictions_per_object(*both) for both in zip(best, objects, strict=True)])
    return (hits[hits > 0] - 1).double().mean().item()


def _layer_evaluator(dataset_name: str, settings: APSettings | None) -> DatasetEvaluator | None:
    """Evaluator for the AP of the layers, in the main process only."""
    kind = evaluator_type(dataset_name)
    makers = {"coco": COCOEvaluator, "lvis": LVISEvaluator}
    if kind not in makers:
        logger.warning("%s has evaluator_type %s: AP per layer needs coco or lvis, skipping it", dataset_name, kind)
        return None
    return makers[kind](dataset_name, settings, tasks=("bbox",), distributed=False)


def _image_id(record: dict[str, Any]) -> int | str:
    """The id of an image in the dataset, the model's inputs and COCO's evaluation."""
    if "image_id" not in record:
        raise ValueError(f"{record.get('file_name', 'An image')} has no image_id: the dataset must give each image one")
    return record["image_id"]


def _boxes_and_classes(record: dict[str, Any]) -> tuple[Boxes, Tensor]:
    """The objects of a record without crowds; boxes x1, y1, x2, y2 in pixels."""
    objects = [x for x in record.get("annotations", ()) if not x.get("iscrowd", 0)]
    boxes = [BoxMode.convert(list(x["bbox"]), x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    return Boxes(boxes), torch.tensor([x["category_id"] for x in objects], dtype=torch.int64)


def _targets(objects: Instances, device: torch.device) -> Targets:
    height, width = objects.image_size
    boxes = objects.gt_boxes.tensor / torch.tensor([width, height, width, height])
    return Targets(objects.gt_classes.to(device), xyxy_to_cxcywh(boxes).to(device))
