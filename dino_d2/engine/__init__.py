"""Training: extends detectron2's engine for DINO."""

from .optimizer import build_optimizer
from .trainer import DINOTrainer

__all__ = ["DINOTrainer", "build_optimizer"]
