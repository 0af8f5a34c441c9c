"""Replaces the package `lvis` for detectron2, because that does not run with NumPy 1.24 or later.

LVIS AP is computed by hotcoco. Importing dino_d2 registers this module as `lvis` if that package is not installed, so
that detectron2 can load and evaluate datasets in LVIS format.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["LVIS", "LVISEval", "LVISResults"]


def register() -> None:
    """Make `import lvis` import this module if the package is not installed."""
    if importlib.util.find_spec("lvis") is None:
        sys.modules["lvis"] = sys.modules[__name__]


@contextmanager
def in_place_of_lvis() -> Iterator[None]:
    """Temporarily make `import lvis` import this module, whether or not the package is installed."""
    before = sys.modules.get("lvis")
    sys.modules["lvis"] = sys.modules[__name__]
    try:
        yield
    finally:
        if before is None:
            del sys.modules["lvis"]
        else:
            sys.modules["lvis"] = before


class LVIS:
    """An annotation file in LVIS format, with the methods that detectron2 uses.

    Args:
        annotation_path: a JSON file; "annotations" may be missing, as in test sets.
    """

    def __init__(self, annotation_path: str):
        self.dataset: dict[str, Any] = json.loads(Path(annotation_path).read_text())
        self.dataset.setdefault("annotations", [])
        self.imgs = {image["id"]: image for image in self.dataset["images"]}
        self.anns = {annotation["id"]: annotation for annotation in self.dataset["annotations"]}
        self.img_ann_map: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in self.dataset["annotations"]:
            self.img_ann_map[annotation["image_id"]].append(annotation)

    def get_ann_ids(self, img_ids: Iterable[int] | None = None) -> list[int]:
        """Annotation ids of these images; None: of all."""
        if img_ids is None:
            return list(self.anns)
        return [annotation["id"] for image_id in img_ids for annotation in self.img_ann_map[image_id]]

    def load_anns(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        return [self.anns[annotation_id] for annotation_id in ids]

    def load_imgs(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        return [self.imgs[image_id] for image_id in ids]


class LVISResults:
    """Detections together with the annotations that they are evaluated on.

    Args:
        lvis_gt: annotations.
        results: detections in COCO's results format.
        max_dets: highest-scoring detections per image, over all classes, that count.
    """

    def __init__(self, lvis_gt: LVIS, results: list[dict[str, Any]], max_dets: int = 300):
        import hotcoco  # imported late: not needed for loading

        self.annotations = hotcoco.COCO(lvis_gt.dataset)
        self.detections = hotcoco.LVISResults(self.annotations, results, max_dets)


def LVISEval(lvis_gt: LVIS, lvis_dt: LVISResults, iou_type: str = "segm") -> Any:  # a class in the package
    """hotcoco's evaluation by LVIS's rules of `lvis_dt`: `run`, `print_results` and `get_results`."""
    import hotcoco

    return hotcoco.LVISEval(lvis_dt.annotations, lvis_dt.detections, iou_type)
