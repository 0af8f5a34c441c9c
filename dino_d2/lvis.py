"""What detectron2 imports from the package `lvis`, which does not run with NumPy 1.24 or later.

LVIS's AP is computed by hotcoco. Importing dino_d2 makes this module known as `lvis` where that package is not
installed, so that detectron2 loads and evaluates datasets in LVIS's format.
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


def provide() -> None:
    """Be `import lvis` where nothing else is."""
    if importlib.util.find_spec("lvis") is None:
        sys.modules["lvis"] = sys.modules[__name__]


@contextmanager
def in_place_of_lvis() -> Iterator[None]:
    """Be `import lvis` for a while, installed or not."""
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
    """An annotation file in LVIS's format, with what detectron2 asks of it.

    Args:
        annotation_path: a JSON file; without "annotations" (a test set's) there are none.
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
        """Of these images, or all."""
        if img_ids is None:
            return list(self.anns)
        return [annotation["id"] for image_id in img_ids for annotation in self.img_ann_map[image_id]]

    def load_anns(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        return [self.anns[annotation_id] for annotation_id in ids]

    def load_imgs(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        return [self.imgs[image_id] for image_id in ids]


class LVISResults:
    """Detections beside the annotations they are held against.

    Args:
        lvis_gt: annotations.
        results: detections in COCO's result format.
        max_dets: how many of an image's detections count, those with the highest scores of all classes.
    """

    def __init__(self, lvis_gt: LVIS, results: list[dict[str, Any]], max_dets: int = 300):
        import hotcoco  # late: most who load a dataset never evaluate one in this format

        self.annotations = hotcoco.COCO(lvis_gt.dataset)
        self.detections = hotcoco.LVISResults(self.annotations, results, max_dets)


def LVISEval(lvis_gt: LVIS, lvis_dt: LVISResults, iou_type: str = "segm") -> Any:  # a class in the package
    """hotcoco's evaluation by LVIS's rules of `lvis_dt`: `run`, `print_results` and `get_results`."""
    import hotcoco

    return hotcoco.LVISEval(lvis_dt.annotations, lvis_dt.detections, iou_type)
