"""Exported models: `OnnxPredictor` runs them without torch or detectron2; `export` creates them."""

from .onnx_predictor import OnnxPredictor

__all__ = ["OnnxPredictor"]
