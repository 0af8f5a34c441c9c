"""95 % intervals by the bootstrap over images: the dataset is drawn again and again, with replacement.

Detections are matched once. A sample only changes how often each image counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from .dataset import Found, Truth
from .matches import AREAS, IGNORED, RIGHT, THRESHOLDS, Matches

LEVEL = (2.5, 97.5)  # percentiles
RECALLS = 100  # steps of the recall, as in COCO
AT_ONCE = 2**20  # numbers in an array that is worked on at a time
PERCENT = (0.0, 100.0)  # bounds
AP_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Samples:
    """AP of each sample in percent; NaN where a class or size has no objects.

    metrics: (samples,) float32 by the names of `AP_METRICS`.
    classes, classes50: (classes, samples) float32, AP and AP50.
    """

    metrics: dict[str, np.ndarray]
    classes: np.ndarray
    classes50: np.ndarray


def draw_samples(images: int, samples: int, seed: int) -> np.ndarray:
    """(images, samples) float32, how often each image is in each sample."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((samples, images), np.float32)
    for row in drawn:
        row[:] = np.bincount(rng.integers(images, size=images), minlength=images)
    return np.ascontiguousarray(drawn.T)


def interval(
    value: float, samples: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float | None, float | None]:
    """The basic bootstrap interval: samples lie about the value as the value lies about the truth.

    The samples' percentiles would be too high. AP is biased upwards on few images, and more so in a sample, which has
    about two thirds of them; the basic interval takes that bias off.

    Args:
        samples: without those that are NaN; if there are none, the interval is (None, None).
        bounds: what the value can be.
    """
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None, None
    high, low = np.clip(2 * value - np.percentile(samples.astype(np.float64), LEVEL), *bounds)
    return float(low), float(high)


def ratio(part: np.ndarray, whole: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ratio of two sums over images in every sample; NaN where the second is 0.

    Args:
        part, whole: (images,) counts.
    """
    above, below = (np.asarray(x, np.float32) @ weights for x in (part, whole))
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def resample(truth: Truth, found: Found, matches: Matches, weights: np.ndarray) -> Samples:
    """AP of every sample.

    Args:
        matches: in all areas.
        weights: from :func:`draw_samples`.
    """
    samples = weights.shape[1]
    sums, numbers = (np.zeros((len(AREAS), len(THRESHOLDS), samples)) for _ in range(2))
    classes, classes50 = (np.full((len(truth.classes), samples), np.nan, np.float32) for _ in range(2))
    by_class = (_by_class(labels, len(truth.classes)) for labels in (found.label, truth.label))
    for label, (mine, objects) in enumerate(zip(*by_class, strict=True)):
        mine = mine[np.argsort(-found.score[mine], kind="stable")]
        for area in range(len(AREAS)):
            counted = objects[matches.counted[area, objects]]
            if not len(counted):
                continue
            ap = average_precision(matches.status[area][:, mine], found.image[mine], truth.image[counted], weights)
            if area == 0:
                classes[label], classes50[label] = 100 * ap.mean(0), 100 * ap[0]
            known = np.isfinite(ap)
            sums[area] += np.where(known, ap, 0)
            numbers[area] += known
    with np.errstate(invalid="ignore"):
        means = 100 * sums / numbers
    whole = {"AP": means[0].mean(0), "AP50": means[0, 0], "AP75": means[0, 5]}
    sizes = dict(zip(AP_METRICS[3:], means[1:].mean(1), strict=True))
    return Samples({name: x.astype(np.float32) for name, x in (whole | sizes).items()}, classes, classes50)


def average_precision(
    status: np.ndarray, image: np.ndarray, object_image: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """COCO's average precision of a class, at 101 recalls, for images that count several times or not at all.

    Args:
        status: (thresholds, n) int8 of detections, sorted by descending score.
        image: (n,) images of the detections.
        object_image: (m,) images of the objects that are to be found.
        weights: (images, samples) float32.

    Returns:
        (thresholds, samples) float32 in [0, 1]; NaN in samples without objects.
    """
    # Precision has its peaks where a detection is right, so only those that are right at some threshold, or count only
    # at some, are looked at one by one; of the many others it is enough to know how many come before.
    some = (status != IGNORED).any(0)
    single = some & ((status == RIGHT).any(0) | (status != status[:1]).any(0))
    place = np.cumsum(single)
    others = np.flatnonzero(some & ~single & (place < place[-1:]))
    width = int(place[-1]) if len(place) else 0
    before = csr_matrix((np.ones(len(others), np.float32), (place[others], image[others])), shape=(width, len(weights)))
    status, image = status[:, single], image[single]
    objects = np.bincount(object_image, minlength=len(weights)).astype(np.float32) @ weights
    ap = np.zeros((len(status), weights.shape[1]), np.float32)
    step = max(1, AT_ONCE // max(1, width))
    for begin in range(0, weights.shape[1], step):
        part = slice(begin, begin + step)
        some_weights = np.ascontiguousarray(weights[:, part])
        counted_before = np.cumsum(before @ some_weights, axis=0)
        single_weights = some_weights[image]
        for row, row_status in enumerate(status):
            right = np.flatnonzero(row_status == RIGHT)
            if len(right):
                counted = counted_before + np.cumsum(single_weights * (row_status != IGNORED)[:, None], axis=0)
                ap[row, part] = _area(single_weights[right], counted[right], objects[part])
    ap[:, objects == 0] = np.nan
    return ap


def _area(right: np.ndarray, counted: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Mean of the highest precision at 101 recalls or higher.

    Args:
        right: (n, samples) weights of the right detections.
        counted: (n, samples) weights of all detections down to each of them.
        objects: (samples,) weights of the objects.
    """
    right = np.cumsum(right, axis=0)
    precision = right / np.maximum(counted, 1)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    reached = np.floor(right * (RECALLS / np.maximum(objects, 1)) + 1e-4) + 1  # of the 101 recalls
    reached[1:] -= reached[:-1].copy()
    return np.einsum("ns,ns->s", precision, reached) / (RECALLS + 1)


def _by_class(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """Indices of the entries of each class."""
    ends = np.cumsum(np.bincount(labels, minlength=classes))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])
