"""What detectron2's engine lacks for DINO."""

from .optimizer import build_optimizer
from .trainer import DINOTrainer

__all__ = ["DINOTrainer", "build_optimizer"]
