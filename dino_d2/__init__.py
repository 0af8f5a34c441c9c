"""DINO (arXiv 2203.03605) for detectron2. Importing the package registers the model and its backbones.

Without torch or detectron2 nothing is registered, and only `dino_d2.deploy` works, which runs exported models.
"""

from typing import Any

from . import lvis
from .detections import Detections

__all__ = ["DINO", "Detections", "Detector", "add_dino_config", "load_config", "model_zoo"]

try:
    from . import model_zoo
    from .config import add_dino_config, load_config
    from .detector import Detector
    from .meta_arch import DINO

    lvis.register()
except ModuleNotFoundError as error:
    if error.name not in ("torch", "detectron2"):
        raise
    _missing = error.name

    def __getattr__(name: str) -> Any:
        if name in __all__:
            how = {"detectron2": "dino-d2 install-detectron2", "torch": "pip install torch torchvision"}[_missing]
            raise ImportError(f"dino_d2.{name} needs {_missing}: {how} (only dino_d2.deploy works without it)")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
