"""DINO (arXiv 2203.03605) for detectron2. Importing the package registers the model and its backbones."""

from .config import add_dino_config, load_config
from .meta_arch import DINO

__all__ = ["DINO", "add_dino_config", "load_config"]
