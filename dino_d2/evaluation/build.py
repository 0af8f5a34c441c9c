"""Build the evaluator for a dataset."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator

from .coco import COCOEvaluator
from .lvis import LVISEvaluator
from .settings import APSettings

Build = Callable[[str, APSettings, str], DatasetEvaluator]

EVALUATORS: dict[str, Build] = {
    "coco": lambda name, settings, folder: COCOEvaluator(name, settings, output_dir=folder),
    "lvis": lambda name, settings, folder: LVISEvaluator(name, settings, output_dir=folder),
    "pascal_voc": lambda name, settings, folder: PascalVOCDetectionEvaluator(name),
}


def evaluator_type(dataset_name: str) -> str:
    """The dataset's `evaluator_type`; "coco" if it has none."""
    return MetadataCatalog.get(dataset_name).get("evaluator_type") or "coco"


def build_evaluator(dataset_name: str, settings: APSettings, output_dir: str) -> DatasetEvaluator:
    """Choose the evaluator by the dataset's `evaluator_type`, as detectron2's tools/train_net.py does.

    Args:
        dataset_name: registered with detectron2.
        settings: for COCO and LVIS; not used for Pascal VOC.
        output_dir: folder for detections, and for the dataset converted to COCO format if necessary.

    Raises:
        ValueError: no evaluator for that type.
    """
    kind = evaluator_type(dataset_name)
    if kind not in EVALUATORS:
        raise ValueError(
            f"The dataset {dataset_name!r} has evaluator_type {kind!r}, which is not supported (supported: "
            f"{', '.join(EVALUATORS)}): override DINOTrainer.build_evaluator, or remove the dataset from DATASETS.TEST"
        )
    return EVALUATORS[kind](dataset_name, settings, output_dir)
