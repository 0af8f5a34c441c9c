"""From weights to boxes in three lines.

detector = Detector.from_pretrained("dino_r50_4scale_12ep")
detections = detector("street.jpg")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn
from tqdm import tqdm

from .checkpoint import DINOCheckpointer
from .checkpoint.assumptions import EXTRA_STATE
from .config import default_device, load_config
from .data import build_test_augmentation, read_image
from .data.images import SUFFIXES, images_in
from .detections import DEFAULT_THRESHOLD, Detections, as_picture, check_classes
from .meta_arch.augmented_inference import TestTimeAugmentation, augmentation_keys, build_test_time_augmentation
from .pretrained import CARD, CONFIG, SAVED, find_pretrained
from .tiles import predict_in_tiles

if TYPE_CHECKING:
    import cv2

OVERLAP = 0.25  # of neighbouring tiles, as a fraction of their side
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
Picture = str | PathLike | Image.Image | np.ndarray
DTYPES = ("float32", "bfloat16", "float16")


class Detector:
    """A model that takes images in any form. It gives the detections of detectron2's `DefaultPredictor`.

    Attributes:
        cfg: the config.
        model: the DINO, in evaluation mode.
        class_names: names of all classes: the config's, else its data set's if there are as many, else those stored
            with the weights; empty if unknown.
        threshold: minimum score of detections, unless a call gives another: the one stored with the weights, which had
            the highest F1 in the last evaluation of their training; 0.3 if none is stored. It can be set.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self.cfg, self.model = cfg, model.eval()
        self.threshold = self._stored_threshold()
        self.class_names = self.model.assumptions.class_names
        self._augmentation = build_test_augmentation(cfg)

    @classmethod
    def from_pretrained(
        cls,
        weights: str | PathLike,
        config_file: str | PathLike | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        overrides: Sequence[Any] = (),
    ) -> Detector:
        """Load a detector.

        Args:
            weights: a name listed by `dino-d2 zoo`; a folder written by :meth:`save_pretrained`; the OUTPUT_DIR of a
                training run; a checkpoint; or a Hugging Face repository id, from which only safetensors and plain YAML
                are read.
            config_file: path or recipe name, for a checkpoint without a config.yaml beside it.
            device: such as "cpu"; by default a GPU if there is one.
            dtype: float32, or bfloat16 or float16 for mixed precision; by default what the config says.
            overrides: KEY, VALUE, … that override the config.

        Raises:
            FileNotFoundError: the weights or their config were not found.
            ValueError: the weights do not match the config; an unknown key or dtype.
        """
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        found = find_pretrained(weights, config_file)
        values = [*found.settings, "MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False, *overrides]
        if dtype is not None:
            values += ["TEST.AMP.ENABLED", dtype != "float32"]
            values += ["TEST.AMP.DTYPE", dtype] if dtype != "float32" else []
        cfg = load_config(found.config_file, values)
        if device is not None or "MODEL.DEVICE" not in overrides[::2]:  # a saved config names the saver's device
            cfg.MODEL.DEVICE = str(device or default_device())
        model = build_model(cfg)
        DINOCheckpointer(model, trust_files=cfg.MODEL.TRUST_WEIGHTS, for_evaluation=True).load(found.weights)
        return cls(cfg, model)

    @property
    def labels(self) -> tuple[str, ...]:
        """What detections call the classes: their names, or "class 0", … if unknown."""
        return self.class_names or tuple(f"class {number}" for number in range(self.cfg.MODEL.DINO.NUM_CLASSES))

    def __repr__(self) -> str:
        return (
            f"Detector({self.cfg.MODEL.BACKBONE.NAME}, {self.cfg.MODEL.DINO.NUM_CLASSES} classes, "
            f"threshold {self.explain_threshold()})"
        )

    def _stored_threshold(self) -> float:
        stored = self.model.assumptions.score_threshold
        return DEFAULT_THRESHOLD if stored is None else stored

    def explain_threshold(self) -> str:
        """`threshold`, and where it comes from."""
        stored = self.model.assumptions.score_threshold
        if self.threshold != self._stored_threshold():
            return f"{self.threshold:.3f}, set"
        if stored is None:
            return f"{DEFAULT_THRESHOLD}, the default: none is stored with the weights"
        return f"{stored:.3f}, stored with the weights: there F1 was highest on the validation set"

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        threshold: float | None = None,
        classes: Sequence[str] = (),
        tile: int = 0,
        augment: bool = False,
        batch_size: int = 1,
        channel_order: str = "rgb",
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Find objects.

        Args:
            images: a path, a URL, a PIL image or an array (H, W, 3) uint8 in RGB (`cv2.imread` gives BGR: pass
                channel_order="bgr"); a list of these; a folder of images, taken in order of file name; a video file.
            threshold: keep detections with a higher score. None: `self.threshold`. 0 keeps
                `TEST.DETECTIONS_PER_IMAGE`.
            classes: names of the classes to keep; empty: all.
            tile: split the image into tiles of at most this side in pixels, for small objects in large images; 0: no
                tiles.
            augment: look at every image, or tile, in three sizes, each also flipped if training flips images, and merge
                the detections: more accurate, and six times as slow.
            batch_size: number of images of the same size to run at once.
            channel_order: "rgb" or "bgr", for arrays.

        Returns:
            :class:`Detections` for one image; a list of them for a list or a folder; for a video an iterator over its
            frames, which are read lazily.

        Raises:
            FileNotFoundError: the file does not exist, or the folder has no images.
            ValueError: a file that is not an image or video, an array of the wrong shape or type, an image without
                pixels or with values of unknown range, an unknown class, a `batch_size` below 1.
            ImportError: a video, without OpenCV.
        """
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order is {channel_order!r}; it must be 'rgb' or 'bgr'")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        check_classes(classes, self.labels)
        threshold = self.threshold if threshold is None else threshold
        how = (threshold, classes, tile, augment)
        path = Path(images) if isinstance(images, str | PathLike) else None
        if path and path.suffix.lower() in VIDEOS:
            return self._detect(_frames(path), *how, batch_size, "rgb")
        if path and path.is_dir():
            images = pictures_in(path)
        elif not isinstance(images, Sequence) or isinstance(images, str):
            return next(self._detect([images], *how, 1, channel_order))
        bar = tqdm(images, disable=len(images) < 2 * batch_size or len(images) < 10, unit="picture")
        return list(self._detect(bar, *how, batch_size, channel_order))

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write config.yaml, model.safetensors and README.md, which :meth:`from_pretrained` reads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED, cfg.DATASETS.COCO_FORMAT = "", False, []
        cfg.OUTPUT_DIR, cfg.WANDB_PROJECT, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = "./output", "", (), ()
        cfg.MODEL.DINO.CLASS_NAMES = list(self.class_names)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.model.state_dict().items()}
        if self.threshold != self._stored_threshold():  # it was set
            assumptions = replace(self.model.assumptions, score_threshold=self.threshold)
            state[EXTRA_STATE] = assumptions.to_tensor()
        save_file(state, folder / SAVED, {"format": "pt"})
        (folder / CONFIG).write_text(cfg.dump())
        (folder / CARD).write_text(self._card(folder.name))

    def _detect(
        self,
        images: Iterable[Picture],
        threshold: float,
        classes: Sequence[str],
        tile: int,
        augment: bool,
        batch_size: int,
        channel_order: str,
    ) -> Iterator[Detections]:
        images = iter(images)
        while batch := [_as_rgb(image, channel_order) for image in islice(images, batch_size)]:
            arrays = [array for _, array in batch]
            for array in arrays:
                if not array.size:
                    raise ValueError(f"the image is empty: {array.shape}")
            predict = self._predict_augmented if augment else self._predict
            found = [self._predict_tiles(predict, array, tile) for array in arrays] if tile else predict(arrays)
            for (source, array), instances in zip(batch, found, strict=True):
                detections = self._as_detections(instances, array.shape[:2], source).above(threshold)
                yield detections.of(*classes) if classes else detections

    def _predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Predict RGB images, as `DefaultPredictor` does.

        Only images of the same size are batched: padding would change the detections.
        """
        found: dict[int, Instances] = {}
        for size in dict.fromkeys(image.shape for image in images):
            indices = [index for index, image in enumerate(images) if image.shape == size]
            inputs = [self._input(images[index], resize=True) for index in indices]
            with torch.no_grad():
                results = self.model(inputs)
            found |= {index: result["instances"].to("cpu") for index, result in zip(indices, results, strict=True)}
        return [found[index] for index in range(len(images))]

    def _predict_augmented(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """The same, each image in several copies."""
        inputs = [self._input(image, resize=False) for image in images]
        with torch.no_grad():
            results = [self._in_copies(self.model.forward_once, x) for x in inputs]
        return [result["instances"].to("cpu") for result in results]

    @cached_property
    def _in_copies(self) -> TestTimeAugmentation:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.merge_from_list([part for item in augmentation_keys(cfg).items() for part in item])
        return build_test_time_augmentation(cfg)

    def _input(self, image: np.ndarray, resize: bool) -> dict[str, Any]:
        height, width = image.shape[:2]
        pixels = convert_PIL_to_numpy(Image.fromarray(image), self.cfg.INPUT.FORMAT)  # as in training: BGR, L, …
        if resize:
            pixels = self._augmentation.get_transform(pixels).apply_image(pixels)
        return {
            "image": torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1)),
            "height": height,
            "width": width,
        }

    def _predict_tiles(
        self, predict: Callable[[Sequence[np.ndarray]], list[Instances]], image: np.ndarray, tile: int
    ) -> Instances:
        settings = self.model.inference

        def drop_duplicates(found: Instances) -> Instances:
            return found[settings.without_duplicates(found)] if settings.drops_duplicates else found

        return predict_in_tiles(lambda part: predict([part])[0], image, tile, int(tile * OVERLAP), drop_duplicates)

    def _as_detections(self, instances: Instances, size: tuple[int, int], source: str | np.ndarray) -> Detections:
        return Detections(
            instances.pred_boxes.tensor.float().numpy(),
            instances.scores.float().numpy(),
            instances.pred_classes.numpy(),
            self.labels,
            size,
            source,
        )

    def _card(self, name: str) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        names = ", ".join(self.class_names) or f"{self.cfg.MODEL.DINO.NUM_CLASSES} classes without names"
        return f"""\
---
library_name: dino-d2
pipeline_tag: object-detection
---
# {name}

A DINO detector (arXiv 2203.03605) with {parameters:.1f} million parameters, for the detectron2 plugin dino_d2.

```python
from dino_d2 import Detector

detector = Detector.from_pretrained("{name}")  # this folder, or OWNER/NAME on Hugging Face
detections = detector("photo.jpg")
```

- Classes: {names}
- Backbone: {self.cfg.MODEL.BACKBONE.NAME}
- Images: shorter side {self.cfg.INPUT.MIN_SIZE_TEST} pixels, longer side at most {self.cfg.INPUT.MAX_SIZE_TEST}
- Score threshold: {self.explain_threshold()}
- Trained on, evaluated on, licence: *fill in before you publish the model*
"""


def pictures_in(folder: Path) -> list[str]:
    """Paths of the images in a folder, sorted by name.

    Raises:
        FileNotFoundError: the folder has none.
    """
    found = images_in(folder)
    if not found:
        raise FileNotFoundError(f"no images found in {folder} (looked for {', '.join(sorted(SUFFIXES))})")
    return [str(path) for path in found]


def _as_rgb(image: Picture, channel_order: str) -> tuple[str | np.ndarray, np.ndarray]:
    """The source that detections keep for drawing, and the pixels (H, W, 3) uint8 in RGB."""
    if isinstance(image, str | PathLike):
        pixels = read_image(image, "RGB")
        return (pixels if "://" in str(image) else str(image)), pixels
    if isinstance(image, Image.Image):
        pixels = np.asarray(as_picture(image))
        return pixels, pixels
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        described = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image must be a path, a PIL image or a uint8 array (height, width, 3), got {described}")
    pixels = image if channel_order == "rgb" else image[:, :, ::-1]
    return pixels, pixels


def _frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video in RGB, with a progress bar. It is opened at once, so that errors come before the first."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f"{path}: reading videos needs OpenCV: pip install opencv-python-headless") from error
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise ValueError(f"{path} cannot be read as a video")
    return _read(video, int(video.get(cv2.CAP_PROP_FRAME_COUNT)) or None)


def _read(video: cv2.VideoCapture, count: int | None) -> Iterator[np.ndarray]:
    try:
        with tqdm(total=count, unit="frame") as bar:
            while True:
                success, frame = video.read()
                if not success:
                    return
                yield frame[:, :, ::-1]
                bar.update()
    finally:
        video.release()
