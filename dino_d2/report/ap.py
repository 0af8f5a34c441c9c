"""AP, TIDE and calibration, by hotcoco."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_d2.evaluation.coco import match_boxes, summary_of

from .dataset import Found, Truth
from .intervals import AP_METRICS
from .matches import FAINT, IOU

if TYPE_CHECKING:
    import hotcoco

TIDE = {
    "classification": "Cls",
    "localization": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
    "false_positives": "FP",
    "false_negatives": "FN",
}
BINS = 10  # of the calibration


@dataclass(frozen=True)
class AveragePrecision:
    """Equal to pycocotools' to the bit, in percent; None where there are no objects.

    metrics: by the names of `AP_METRICS`. classes, classes50: AP and AP50 of each class.
    curves: (101, classes) precision at IoU 0.5 at each recall, in percent; -100 where there are no objects.
    """

    metrics: dict[str, float | None]
    classes: list[float | None]
    classes50: list[float | None]
    curves: np.ndarray


def evaluate(truth: Truth, found: Found, max_dets: int) -> hotcoco.COCOeval:
    """Match with hotcoco. Images, categories and annotations are numbered anew, so any ids will do."""
    import hotcoco  # imported late: not needed without evaluation

    ground_truth = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(1, len(truth.ids) + 1)],
        [{"id": number, "name": str(number)} for number in range(1, len(truth.classes) + 1)],
        truth.image.astype(np.int64) + 1,
        truth.label.astype(np.int64) + 1,
        truth.xywh,
        ids=np.arange(1, len(truth.image) + 1),
        area=truth.area,
        iscrowd=truth.crowd,
    )
    rows = np.column_stack([found.image + 1, found.xywh, found.score, found.label + 1]).reshape(-1, 7)
    return match_boxes(ground_truth, rows, max_dets)


def average_precision(evaluation: hotcoco.COCOeval, max_dets: int) -> AveragePrecision:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
        summary = summary_of(evaluation, max_dets)
    precision = summary.eval["precision"][:, :, :, 0, -1]
    return AveragePrecision(
        {name: _percent(value) for name, value in zip(AP_METRICS, summary.stats[: len(AP_METRICS)], strict=True)},
        [_mean(precision[:, :, label]) for label in range(precision.shape[2])],
        [_mean(precision[0, :, label]) for label in range(precision.shape[2])],
        100 * precision[0],
    )


def tide(evaluation: hotcoco.COCOeval) -> dict[str, float | None]:
    """AP50 in percent, and how many points it would gain without each kind of error."""
    errors = evaluation.tide_errors(pos_thr=IOU, bg_thr=FAINT)
    if not (evaluation.eval["precision"] > -1).any():  # no objects
        return dict.fromkeys(("ap50", *TIDE))
    return {"ap50": 100 * errors["ap_base"]} | {name: 100 * errors["delta_ap"][short] for name, short in TIDE.items()}


def calibration(evaluation: hotcoco.COCOeval) -> dict[str, Any]:
    """Mean score and precision by score, both in [0, 1], and the expected calibration error."""
    measured = evaluation.calibration(n_bins=BINS, iou_threshold=IOU)
    keys = {"low": "bin_lower", "high": "bin_upper", "count": "count", "score": "avg_confidence"}
    keys["precision"] = "avg_accuracy"
    bins = [{name: bin_[key] for name, key in keys.items()} for bin_ in measured["bins"]]
    for bin_ in bins:
        if not bin_["count"]:
            bin_["score"] = bin_["precision"] = None
    return {"bins": bins, "error": measured["ece"] if measured["num_detections"] else None}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


def _mean(precision: np.ndarray) -> float | None:
    """As detectron2 does for a class."""
    known = precision[precision > -1]
    return float(np.mean(known) * 100) if len(known) else None
