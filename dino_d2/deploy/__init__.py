"""Exported models: `OnnxPredictor` runs them and needs neither torch nor detectron2; `export` makes them."""

from .onnx_predictor import DetectedObjects, OnnxPredictor

__all__ = ["DetectedObjects", "OnnxPredictor"]
