"""Exported models: `OnnxPredictor` runs them and needs neither torch nor detectron2; `export` makes them."""

from .onnx_predictor import OnnxPredictor

__all__ = ["OnnxPredictor"]
