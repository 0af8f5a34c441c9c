"""What the paper measures beside AP, as detectron2 evaluators."""

from .atd import average_top_k_distance
from .query_evaluator import QueryEvaluator, predictions_per_object
from .recorder import DecoderRecorder

__all__ = ["DecoderRecorder", "QueryEvaluator", "average_top_k_distance", "predictions_per_object"]
