"""Average precision with detectron2's evaluators, and the paper's other metrics."""

from .atd import average_top_k_distance
from .build import build_evaluator
from .coco import COCOEvaluator
from .lvis import LVISEvaluator
from .query_evaluator import QueryEvaluator, predictions_per_object
from .recorder import DecoderRecorder
from .settings import APSettings

__all__ = [
    "APSettings",
    "COCOEvaluator",
    "DecoderRecorder",
    "LVISEvaluator",
    "QueryEvaluator",
    "average_top_k_distance",
    "build_evaluator",
    "predictions_per_object",
]
