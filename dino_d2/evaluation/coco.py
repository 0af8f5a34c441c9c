"""COCO AP with hotcoco where its results equal those of pycocotools exactly."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from detectron2 import evaluation
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_d2.data.annotations import can_be_evaluated, completed

from .f1 import best_f1, matches_of_hotcoco, matches_of_pycocotools
from .settings import FEWEST_DETS, APSettings, hotcoco_is_installed

if TYPE_CHECKING:
    import hotcoco

logger = logging.getLogger(__name__)

DETECTIONS = "coco_instances_results.json"  # as detectron2's evaluator names the file
ANNOTATION_FIELDS = {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}
COUNTS = (1, FEWEST_DETS)  # further detection limits at which COCO reports recall, besides APSettings.max_dets


class COCOEvaluator(evaluation.COCOEvaluator):
    """detectron2's evaluator that uses hotcoco if it is exactly equal to pycocotools, and logs which one is used.

    hotcoco matches boxes and accumulates precision and recall; detectron2's code derives the metrics from these arrays
    as from pycocotools'. Masks and keypoints always use pycocotools.

    Beside AP stand "F1", the highest at IoU 0.5 in percent, and "score_threshold", in [0, 1], which gives it
    (:func:`best_f1`).

    Args:
        dataset_name: registered with detectron2.
        settings: backend and maximum number of detections.
        tasks, distributed, output_dir: see :class:`detectron2.evaluation.COCOEvaluator`.
    """

    def __init__(
        self,
        dataset_name: str,
        settings: APSettings | None = None,
        *,
        tasks: tuple[str, ...] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ):
        self._settings = settings or APSettings()
        super().__init__(
            dataset_name,
            tasks,
            distributed,
            output_dir,
            max_dets_per_image=self._settings.max_dets,
            use_fast_impl=False,  # detectron2's C++ version, unofficial and missing in most builds
        )
        if complete_annotations(self._coco_api):
            logger.info(
                "Annotations of %s lack area or iscrowd: the area of the box is used, and they are no crowds",
                dataset_name,
            )
        if number_annotations(self._coco_api):
            logger.info(
                "Annotation ids of %s are not different positive integers: its objects are numbered anew", dataset_name
            )

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        """Fill `self._results`; see :meth:`detectron2.evaluation.COCOEvaluator._eval_predictions`."""
        detections = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        if not self._do_evaluation or not detections:
            super()._eval_predictions(predictions, img_ids)
            return
        tasks = self._tasks or self._tasks_from_predictions(detections)
        reason = self._why_pycocotools(tasks, detections)
        if reason:
            version = importlib.metadata.version("pycocotools")
            logger.info("Computing AP of %s with pycocotools %s: %s", self._metadata.name, version, reason)
            super()._eval_predictions(predictions, img_ids)
            return
        version = importlib.metadata.version("hotcoco")
        logger.info("Computing AP of %s with hotcoco %s", self._metadata.name, version)
        self._to_dataset_categories(detections)
        if self._output_dir:
            with PathManager.open(os.path.join(self._output_dir, DETECTIONS), "w") as file:
                file.write(json.dumps(detections))
        evaluated = evaluate_boxes(self._coco_api.dataset, detections, self._settings.max_dets, img_ids)
        self._results["bbox"] = self._derive_coco_results(evaluated, "bbox", self._metadata.get("thing_classes"))

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """See :meth:`detectron2.evaluation.COCOEvaluator._derive_coco_results`; of boxes with F1. Without detections
        the names are the same."""
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type != "bbox":
            return results
        if coco_eval is None:
            names = class_names or ()
            of_classes = [f"AP-{name}" for name in names] if len(names) > 1 else []  # as detectron2
            return results | dict.fromkeys([*of_classes, "F1", "score_threshold"], float("nan"))
        matches = coco_eval.eval["matches"] if "matches" in coco_eval.eval else matches_of_pycocotools(coco_eval)
        f1, threshold = best_f1(matches)
        logger.info("F1 at IoU 0.5 is highest, %.1f, for detections that score more than %.3f", 100 * f1, threshold)
        return results | {"F1": 100 * f1, "score_threshold": threshold}

    def _why_pycocotools(self, tasks: Iterable[str], detections: Sequence[dict[str, Any]]) -> str:
        """The reason to use pycocotools; empty if hotcoco can be used."""
        if self._settings.backend == "pycocotools":
            return "selected by TEST.COCO_BACKEND"
        if set(tasks) != {"bbox"}:
            return "hotcoco is used only for boxes"
        if not hotcoco_is_installed():
            return "hotcoco (faster) is not installed"
        return difference(self._coco_api.dataset, detections)

    def _to_dataset_categories(self, detections: Iterable[dict[str, Any]]) -> None:
        """Convert classes counted from 0 to category ids of the annotation file, in place."""
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return
        dataset_ids = {label: dataset_id for dataset_id, label in mapping.items()}
        for detection in detections:
            if detection["category_id"] not in dataset_ids:
                raise ValueError(
                    f"A prediction has class {detection['category_id']}, but {self._metadata.name!r} has "
                    f"{len(dataset_ids)} classes: MODEL.DINO.NUM_CLASSES and the dataset must agree"
                )
            detection["category_id"] = dataset_ids[detection["category_id"]]


def number_annotations(coco: COCO) -> bool:
    """Number annotations from 1 unless their ids are different positive integers, and tell whether that was necessary.

    pycocotools never counts an object with id 0 as found, confuses objects with the same id, and fails for strings and
    for numbers that float64 cannot hold. Many programs, such as Roboflow, count from 0.
    """
    annotations = coco.dataset.get("annotations", [])
    ids = {annotation["id"] for annotation in annotations}
    if len(ids) == len(annotations) and all(isinstance(number, int) and 0 < number < 2**53 for number in ids):
        return False
    _replace_annotations(coco, [entry | {"id": number} for number, entry in enumerate(annotations, start=1)])
    return True


def complete_annotations(coco: COCO) -> bool:
    """Add the area and iscrowd that pycocotools needs where they are missing, and tell whether that was necessary."""
    annotations = coco.dataset.get("annotations", [])
    if all(map(can_be_evaluated, annotations)):
        return False
    _replace_annotations(coco, [completed(entry) for entry in annotations])
    return True


def _replace_annotations(coco: COCO, annotations: list[dict[str, Any]]) -> None:
    coco.dataset = coco.dataset | {"annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()


def evaluate_boxes(
    dataset: dict[str, Any], detections: Sequence[dict[str, Any]], max_dets: int, img_ids: list[int] | None = None
) -> COCOevalMaxDets:
    """Evaluate boxes with hotcoco; returns `stats` and `eval` as pycocotools does, with the :class:`Matches` in `eval`.

    Args:
        dataset: in COCO format, without a :func:`difference`.
        detections: at least one, in COCO's results format.
        max_dets: maximum number of detections per image and class, at least 10.
        img_ids: images to evaluate; None: all.
    """
    import hotcoco  # imported late: not needed without evaluation

    annotations = dataset["annotations"]
    # Arrays instead of dictionaries: hotcoco then ignores masks, captions and other fields that may be invalid.
    ground_truth = hotcoco.COCO.from_arrays(
        [{"id": image["id"]} for image in dataset["images"]],
        [{"id": category["id"], "name": str(category.get("name", ""))} for category in dataset["categories"]],
        np.array([x["image_id"] for x in annotations], np.int64),
        np.array([x["category_id"] for x in annotations], np.int64),
        np.array([x["bbox"] for x in annotations], np.float64).reshape(len(annotations), 4),
        ids=np.array([x["id"] for x in annotations], np.int64),
        area=np.array([x["area"] for x in annotations], np.float64),
        iscrowd=np.array([x["iscrowd"] for x in annotations], bool),
    )
    rows = np.array([(x["image_id"], *x["bbox"], x["score"], x["category_id"]) for x in detections], np.float64)
    matched = match_boxes(ground_truth, rows, max_dets, img_ids)
    summary = summary_of(matched, max_dets)
    summary.eval["matches"] = matches_of_hotcoco(matched, rows[:, 5])
    return summary


def match_boxes(
    ground_truth: hotcoco.COCO, rows: np.ndarray, max_dets: int, img_ids: list[int] | None = None
) -> hotcoco.COCOeval:
    """Match boxes with hotcoco, and accumulate precision and recall.

    Args:
        rows: (n, 7) float64, of each detection the image's id, x, y, width and height in pixels, score, category's id.
        max_dets, img_ids: as for :func:`evaluate_boxes`.
    """
    import hotcoco  # imported late: not needed without evaluation

    matched = hotcoco.COCOeval(ground_truth, ground_truth.load_res(rows), "bbox")
    matched.params.max_dets = [*COUNTS, max_dets]
    if img_ids is not None:
        matched.params.img_ids = img_ids
    matched.evaluate()
    matched.accumulate()
    return matched


def summary_of(matched: hotcoco.COCOeval, max_dets: int) -> COCOevalMaxDets:
    """`stats` and `eval` as pycocotools has them, of the result of :func:`match_boxes`."""
    summary = COCOevalMaxDets(iouType="bbox")
    summary.params.maxDets = [*COUNTS, max_dets]
    summary.eval = {key: matched.eval[key] for key in ("precision", "recall", "scores")}
    summary.summarize()
    return summary


def difference(dataset: dict[str, Any], detections: Sequence[dict[str, Any]]) -> str:
    """Why hotcoco's results would differ from pycocotools'; empty if they are exactly equal."""
    annotations = dataset["annotations"]
    if any(not x.keys() >= ANNOTATION_FIELDS for x in annotations):
        return f"annotations lack one of {', '.join(sorted(ANNOTATION_FIELDS))}"
    image_ids = {image["id"] for image in dataset["images"]}
    ids = [*image_ids, *(x["id"] for x in dataset["categories"])]
    ids += [x[key] for x in annotations for key in ("id", "image_id", "category_id")]
    if not all(isinstance(number, int) and 0 <= number < 2**53 for number in ids):
        return "hotcoco needs non-negative integer ids"
    annotation_ids = {x["id"] for x in annotations}
    if 0 in annotation_ids or len(annotation_ids) < len(annotations):
        return "annotations have duplicate ids or the id 0, which pycocotools never counts as found"
    if not {x["image_id"] for x in detections} <= image_ids:
        return "there are detections for images that are not in the dataset"
    sizes = sum(x["area"] + sum(x["bbox"]) for x in annotations)
    if not math.isfinite(sizes + sum(x["score"] + sum(x["bbox"]) for x in detections)):
        return "annotations or detections are infinite or NaN"
    return ""
