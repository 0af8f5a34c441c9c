"""Settings for average precision."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from detectron2.config import CfgNode

BACKENDS = ("auto", "pycocotools", "hotcoco")
FEWEST_DETS = 10  # that can be the limit: COCO also reports recall at 10, and pycocotools would count as many


def hotcoco_is_installed() -> bool:
    return importlib.util.find_spec("hotcoco") is not None


def require_hotcoco(purpose: str) -> None:
    """
    Raises:
        ImportError: hotcoco is not installed; the message names `purpose`.
    """
    if not hotcoco_is_installed():
        raise ImportError(f'{purpose} needs hotcoco, which is not installed: pip install "hotcoco>=1.3,<2"')


@dataclass(frozen=True)
class APSettings:
    """Settings for average precision.

    backend: for COCO AP; "auto" is hotcoco if it is installed and equal to pycocotools.
    max_dets: highest-scoring detections per image and class that count; 100 in COCO.

    Raises:
        ValueError: an unknown backend, or max_dets below 10.
        ImportError: hotcoco is selected but not installed.
    """

    backend: str = "auto"
    max_dets: int = 100

    @classmethod
    def of_config(cls, cfg: CfgNode) -> APSettings:
        return cls(cfg.TEST.COCO_BACKEND, cfg.TEST.MAX_DETS_PER_IMAGE)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"TEST.COCO_BACKEND is {self.backend!r}; it must be one of {', '.join(BACKENDS)}")
        if self.max_dets < FEWEST_DETS:
            raise ValueError(f"TEST.MAX_DETS_PER_IMAGE is {self.max_dets}; it must be at least {FEWEST_DETS}")
        if self.backend == "hotcoco":
            require_hotcoco("TEST.COCO_BACKEND hotcoco")
