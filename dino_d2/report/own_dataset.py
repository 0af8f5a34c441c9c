"""Report on a training run with the user's own images: AP per class, and the best and worst images drawn."""

from __future__ import annotations

import logging
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image, ImageDraw
from tabulate import tabulate

from dino_d2.data import CocoFiles, class_names, read_image, stream_results
from dino_d2.detections import DEFAULT_THRESHOLD, draw_boxes
from dino_d2.engine.run_folder import EVALUATION
from dino_d2.evaluation.coco import DETECTIONS
from dino_d2.fonts import load_font

from .dataset import corners, part_of, read_found, read_truth
from .evaluated import files_of
from .matches import IGNORED, RIGHT, match, overlapping

EXAMPLES = "examples"  # folder in OUTPUT_DIR
EACH = 3  # number of best images, and of worst images
PANEL, TITLE, GAP = 800, 40, 10  # pixels: longest side of an image, height of the title, gap
NARROWEST = 400  # minimum width for a title, in pixels
PAPER, INK = (255, 255, 255), (0, 0, 0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objects:
    """Objects of an image. boxes: (n, 4) x1, y1, x2, y2 in pixels. labels: n, counted from 0. scores: n, in [0, 1]; 1
    for annotations."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ScoredImage:
    """An image with its ground truth and detections. truth: annotated objects. found: detections with a score above
    the threshold. right: number of detections matched to an object, one to one."""

    path: Path
    truth: Objects
    found: Objects
    right: int

    @property
    def wrong(self) -> int:
        """Missed objects plus false detections."""
        return len(self.truth) + len(self.found) - 2 * self.right

    @property
    def f1(self) -> float:
        """2 right / (truth + found); 1 if there are neither objects nor detections."""
        return 2 * self.right / (2 * self.right + self.wrong) if self.right or self.wrong else 1.0


def own_dataset(cfg: CfgNode) -> str:
    """Name of the first dataset in `DATASETS.TEST` that is from `DATASETS.COCO_FORMAT`; empty if there is none."""
    own = {entry[0] for entry in cfg.DATASETS.COCO_FORMAT}
    return next((name for name in cfg.DATASETS.TEST if name in own), "")


def report_on_own_dataset(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Log AP per class, draw the best and worst images to `OUTPUT_DIR/examples`, and log the next command.

    What cannot be reported is logged: a training of hours does not end in an error.

    Args:
        results: of the last evaluation, which wrote its detections to `OUTPUT_DIR/inference`.
    """
    name = own_dataset(cfg)
    metrics = results.get("bbox") or results.get(name, {}).get("bbox")
    detections = Path(cfg.OUTPUT_DIR, EVALUATION, name, DETECTIONS)
    if not metrics or not detections.is_file():  # no detections, or no ground truth
        return
    try:
        _report(cfg, files_of(cfg, name), metrics, detections)
    except (OSError, ValueError) as error:
        logger.warning("No AP by class or no examples of %s: %s", name, error)
    logger.info("Next: dino-d2 predict --weights %s --input PHOTO --output found", shlex.quote(cfg.OUTPUT_DIR))


def _report(cfg: CfgNode, files: CocoFiles, metrics: dict[str, float], detections: Path) -> None:
    threshold = metrics.get("score_threshold", math.nan)
    threshold = DEFAULT_THRESHOLD if math.isnan(threshold) else threshold
    images = score_images(files, stream_results(detections), threshold, cfg.TEST.MAX_DETS_PER_IMAGE)
    names = class_names(cfg)
    counts = Counter(label for image in images for label in image.truth.labels.tolist())
    logger.info("AP on the %d images of %s:\n%s", len(images), files.annotations, ap_table(metrics, names, counts))
    best, worst = best_and_worst(images)
    folder = Path(cfg.OUTPUT_DIR, EXAMPLES)
    folder.mkdir(parents=True, exist_ok=True)
    for what, chosen in (("best", best), ("worst", worst)):
        for number, image in enumerate(chosen, start=1):
            draw(image, names).save(folder / f"{what}_{number}.png")
    logger.info("Best and worst images, ground truth beside detections above %.3f: %s", threshold, folder)


def ap_table(metrics: dict[str, float], names: Sequence[str], counts: dict[int, int]) -> str:
    """A table of AP per class.

    Args:
        metrics: from detectron2, in percent; with "AP-NAME" for each class if there are several.
        counts: number of objects by class.
    """
    rows = [[name, counts.get(label, 0), metrics.get(f"AP-{name}", metrics["AP"])] for label, name in enumerate(names)]
    rows.append(["all", sum(counts.values()), metrics["AP"]])
    shown = [[name, count, "–" if math.isnan(ap) else f"{ap:.1f}"] for name, count, ap in rows]
    more = ", ".join(f"{key} {metrics[key]:.1f}" for key in ("AP50", "AP75") if key in metrics)
    return tabulate(shown, ["class", "objects", "AP"], tablefmt="simple", disable_numparse=True) + f"\n{more}"


def score_images(
    files: CocoFiles,
    detections: Iterable[dict[str, Any]],
    threshold: float = DEFAULT_THRESHOLD,
    max_dets: int = 100,
) -> list[ScoredImage]:
    """Match the detections of each image, in the order of the images' ids.

    Unmatched detections inside a crowd of their class are ignored.

    Args:
        detections: in COCO's results format.
        threshold: score that a detection must exceed to count.
        max_dets: highest-scoring detections of an image and class that count.
    """
    truth = read_truth(files)
    found = read_found(detections, truth, max_dets)
    status = match(truth, found, overlapping(truth, found), areas=("all",)).status[0, 0]
    counts = (found.score > threshold) & (status != IGNORED)
    right = np.bincount(found.image[counts & (status == RIGHT)], minlength=len(truth.ids))
    images = []
    for index, name in enumerate(truth.names):
        objects, mine = part_of(truth.image, index), part_of(found.image, index)
        objects = objects.start + np.flatnonzero(~truth.crowd[objects])
        mine = mine.start + np.flatnonzero(counts[mine])[::-1]  # high scores are drawn last, on top
        annotated = Objects(corners(truth.xywh[objects]), truth.label[objects], np.ones(len(objects)))
        detected = Objects(corners(found.xywh[mine]), found.label[mine], found.score[mine])
        images.append(ScoredImage(files.images / name, annotated, detected, int(right[index])))
    return images


def best_and_worst(images: Sequence[ScoredImage]) -> tuple[list[ScoredImage], list[ScoredImage]]:
    """Up to `EACH` best and worst images by F1, without overlap. Ties are broken by more matches, then fewer errors."""
    ranking = sorted(images, key=lambda image: (-image.f1, -image.right, image.wrong))
    return ranking[:EACH], ranking[EACH:][: -EACH - 1 : -1]


def draw(image: ScoredImage, names: Sequence[str]) -> Image.Image:
    """Draw the image twice, with ground truth and with detections."""
    picture = Image.fromarray(read_image(image.path, "RGB"))
    scale = PANEL / max(picture.size)
    picture = picture.resize([max(round(side * scale), 1) for side in picture.size], Image.Resampling.LANCZOS)
    truth, found = image.truth, image.found
    panels = [
        (f"{image.path.name}: {len(truth)} objects", truth, [names[label] for label in truth.labels.tolist()]),
        (
            f"{len(found)} found, {image.right} correct: F1 {image.f1:.2f}",
            found,
            [f"{names[label]} {score:.2f}" for label, score in zip(found.labels.tolist(), found.scores, strict=True)],
        ),
    ]
    width = max(picture.width, NARROWEST)
    sheet = Image.new("RGB", (2 * width + 3 * GAP, TITLE + picture.height + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), load_font(20, [title for title, _, _ in panels])
    for place, (title, objects, texts) in enumerate(panels):
        left = GAP + place * (width + GAP)
        pen.text((left, GAP), title, fill=INK, font=font)
        drawn = draw_boxes(picture.copy(), (objects.boxes * scale).tolist(), objects.labels.tolist(), texts)
        sheet.paste(drawn, (left, TITLE))
    return sheet
