"""The evaluator that a dataset asks for."""

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
    """What the dataset was registered with; "coco" if nothing was said."""
    return MetadataCatalog.get(dataset_name).get("evaluator_type") or "coco"


def build_evaluator(dataset_name: str, settings: APSettings, output_dir: str) -> DatasetEvaluator:
    """Chosen as detectron2's tools/train_net.py does, by the `evaluator_type` of the dataset.

    Args:
        dataset_name: registered with detectron2.
        settings: of COCO's and LVIS's AP; Pascal VOC's has none.
        output_dir: where detections are written to, and the dataset in COCO's format if it is not in it.

    Raises:
        ValueError: there is no evaluator for that type.
    """
    kind = evaluator_type(dataset_name)
    if kind not in EVALUATORS:
        raise ValueError(
            f"The dataset {dataset_name!r} has evaluator_type {kind!r}, for which there is no evaluator of boxes here "
            f"(there are {', '.join(EVALUATORS)}): override DINOTrainer.build_evaluator, or leave the dataset out of "
            "DATASETS.TEST"
        )
    return EVALUATORS[kind](dataset_name, settings, output_dir)
