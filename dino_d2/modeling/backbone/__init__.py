"""Backbones that detectron2 does not register. Importing this package registers them."""

from .swin import build_swin_backbone
from .timm_wrapper import TimmBackbone, build_timm_backbone
from .vit import build_vitdet_backbone

__all__ = ["TimmBackbone", "build_swin_backbone", "build_timm_backbone", "build_vitdet_backbone"]
