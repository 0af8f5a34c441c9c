"""Predict with an ONNX file written by `tools/export.py`, using only onnxruntime and NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import onnxruntime

from dino_d2.detections import DEFAULT_THRESHOLD, Detections

OUTPUTS = ("boxes", "scores", "classes")  # of the session, those of them that are used
METADATA_KEY = "dino_d2"  # key of the JSON in the file's metadata
PRECISION_BITS = 22  # of the weights for resizing 8-bit pixels, as in Pillow


class OnnxPredictor:
    """Gives the detections of detectron2's `DefaultPredictor` with the exported model.

    Args:
        path: ONNX file.
        providers: onnxruntime execution providers, in order of preference.
        session_options: for onnxruntime, such as the number of threads.

    Attributes:
        session: the onnxruntime session; `prepare` makes its inputs.
        class_names: of all classes, or empty.
        input_format: channel order of the session's input, "RGB" or "BGR".
        threshold: score threshold stored with the weights (see :class:`dino_d2.Detector`), else 0.3. It is not applied:
            `predict(image).above(predict.threshold)` is what `Detector` shows.
        min_size, max_size: size of the shorter side after resizing, and limit for the longer one; min_size 0: no
            resizing.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it was not written by `tools/export.py`.
    """

    def __init__(
        self,
        path: str | PathLike,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        self.session = onnxruntime.InferenceSession(str(path), session_options, list(providers))
        metadata = self.session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise ValueError(f"{path} has no preprocessing settings: it was not written by tools/export.py")
        settings = json.loads(metadata[METADATA_KEY])
        self.class_names = tuple(settings["class_names"])
        self.input_format: str = settings["input_format"]
        self.min_size: int = settings["min_size"]
        self.max_size: int = settings["max_size"]
        threshold = settings.get("score_threshold")  # files of before there was one lack it
        self.threshold: float = DEFAULT_THRESHOLD if threshold is None else threshold

    def __call__(self, image: np.ndarray) -> Detections:
        """
        Args:
            image: (H, W, 3) uint8, always in BGR, as from `cv2.imread`.

        Raises:
            ValueError: the image has another shape or type.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Predict several images of any sizes.

        Only images that are resized to the same size run at once: padding would change the detections.
        """
        _check(images)
        sizes = [self._size(*image.shape[:2]) for image in images]
        found: dict[int, Detections] = {}
        for size in dict.fromkeys(sizes):
            indices = [index for index, other in enumerate(sizes) if other == size]
            arrays = self.session.run(OUTPUTS, self.prepare([images[index] for index in indices]))
            for index, *of_image in zip(indices, *arrays, strict=True):
                found[index] = self._detections(images[index], *of_image)
        return [found[index] for index in range(len(images))]

    def prepare(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Make the session's inputs from images as in `__call__`: resize, reorder channels and pad."""
        _check(images)
        resized = [resize(image, *self._size(*image.shape[:2])) for image in images]
        sizes = np.array([image.shape[:2] for image in resized], np.int64)
        pixels = np.zeros((len(images), 3, *sizes.max(axis=0)), np.uint8)
        for padded, image, (height, width) in zip(pixels, resized, sizes, strict=True):
            ordered = image[:, :, ::-1] if self.input_format == "RGB" else image
            padded[:, :height, :width] = ordered.transpose(2, 0, 1)
        original_sizes = np.array([image.shape[:2] for image in images], np.int64)
        return {"pixels": pixels, "image_sizes": sizes, "original_sizes": original_sizes}

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.min_size == 0:
            return height, width
        return shortest_edge_size(height, width, self.min_size, self.max_size)

    def _detections(self, image: np.ndarray, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> Detections:
        keep = scores > 0  # the others are duplicates, or boxes without area
        rgb = image[:, :, ::-1]
        return Detections(boxes[keep], scores[keep], classes[keep], self.class_names, image.shape[:2], rgb)


def shortest_edge_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width with the shorter side `min_size`, or less to limit the longer one to `max_size`."""
    scale = min_size / min(height, width)
    # Same order of operations as in detectron2, because rounding depends on it.
    new_height, new_width = (min_size, scale * width) if height < width else (scale * height, min_size)
    longest = max(new_height, new_width)
    if longest > max_size:
        shrink = max_size / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, channels) uint8 to (height, width, channels), bit for bit like Pillow's bilinear filter.

    Resizes the width first. Since version 13 Pillow starts with the height if that is faster, as when shrinking images
    much taller than wide; some of their pixels differ by one, because of intermediate rounding.
    """
    if width != image.shape[1]:
        image = _resize_lines(image.transpose(1, 0, 2), width).transpose(1, 0, 2)
    if height != image.shape[0]:
        image = _resize_lines(image, height)
    return np.ascontiguousarray(image)


def _resize_lines(image: np.ndarray, size: int) -> np.ndarray:
    """Resize along the first axis: every output line is a weighted sum of neighbouring input lines.

    The filter is a triangle that widens when shrinking (antialiasing). Weights are integers of `PRECISION_BITS`; sums
    are rounded once.
    """
    length = image.shape[0]
    scale = length / size
    reach = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), length)
    line = first[:, None] + np.arange((last - first).max())  # (size, taps)
    weight = np.maximum(1 - np.abs((line - centre[:, None] + 0.5) * (1 / reach)), 0)
    weight[line >= last[:, None]] = 0
    total = np.zeros(size)
    for tap in weight.T:  # sequential: pairwise summation would round differently
        total += tap
    weight = (weight * (1 / total)[:, None] * (1 << PRECISION_BITS) + 0.5).astype(np.int32)
    line = np.minimum(line, length - 1)

    result = np.full((size, *image.shape[1:]), 1 << (PRECISION_BITS - 1), np.int32)
    for tap in range(line.shape[1]):
        result += image[line[:, tap]] * weight[:, tap, None, None]
    return np.clip(result >> PRECISION_BITS, 0, 255).astype(np.uint8)


def _check(images: Sequence[np.ndarray]) -> None:
    if not len(images):
        raise ValueError("no images given")
    for image in images:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            described = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"an image must be a uint8 array (height, width, 3) in BGR order, got {described}")
        if not image.size:
            raise ValueError(f"the image is empty: {image.shape}")
