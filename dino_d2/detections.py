"""The detections in one image. Needs only NumPy, so exported models return them without torch."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas
    import supervision
    from detectron2.structures import Instances
    from PIL.Image import Image

# Category ids of COCO's 80 classes, in order.
COCO_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
DEEP_MODES = ("I", "F")  # prefixes of PIL's modes with more than 8 bits; converting those clips at 255
DEFAULT_THRESHOLD = 0.3  # of the score, where weights come without one of their own
FIRST_AND_LAST_OF_COCO = ("person", "toothbrush")
# Distinguishable on photographs and by colour-blind readers (Okabe and Ito), lightest first.
COLOURS = [(240, 228, 66), (86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178)]


class Detection(NamedTuple):
    """One detected object.

    name: of the class; "class 3" if the model has no class names.
    score: in [0, 1].
    box: x1, y1, x2, y2 in pixels of the image.
    class_id: counted from 0.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    class_id: int


@dataclass(repr=False, eq=False)
class Detections:
    """The detections in one image, highest score first. Iterating yields each :class:`Detection`.

    boxes: (n, 4) float32, x1, y1, x2, y2 in pixels of the image.
    scores: (n,) float32 in [0, 1].
    classes: (n,) int64, counted from 0.
    class_names: of all classes of the model; empty if unknown.
    image_size: height, width.
    image: a path or URL, or (H, W, 3) uint8 in RGB; None if not kept.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    image: str | np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """Class name of each of the n objects."""
        return [self._name(number) for number in self.classes.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        rows = zip(self.names, self.scores.tolist(), self.boxes.tolist(), self.classes.tolist(), strict=True)
        return (Detection(name, score, tuple(box), number) for name, score, box, number in rows)

    def __getitem__(self, which: int | slice | np.ndarray | Sequence) -> Detection | Detections:
        """One object by its index, or :class:`Detections` by a slice, a mask or a list of indices."""
        if isinstance(which, int | np.integer):
            return list(self)[which]
        which = which if isinstance(which, slice) else np.asarray(which, dtype=None if len(which) else np.int64)
        return replace(self, boxes=self.boxes[which], scores=self.scores[which], classes=self.classes[which])

    def above(self, score: float) -> Detections:
        """Detections with a score above `score`."""
        return self[self.scores > score]

    def of(self, *names: str) -> Detections:
        """Detections of these classes: "class 3" if the model has no class names.

        Raises:
            ValueError: an unknown class.
        """
        if self.class_names:
            check_classes(names, self.class_names)
        elif wrong := [name for name in names if not re.fullmatch(r"class \d+", name)]:
            raise ValueError(f"unknown class {wrong[0]}; without names the classes are class 0, class 1, …")
        return self[np.array([name in names for name in self.names], bool)]

    def draw(self, image: str | PathLike | Image | np.ndarray | None = None) -> Image:
        """The image with boxes, class names and scores drawn on it.

        Args:
            image: the image to draw on, arrays in RGB; by default the one the detections are from.

        Raises:
            ValueError: the image was not kept, or has another size.
        """
        picture = as_picture(self.image if image is None else image)
        height, width = self.image_size
        if picture.size != (width, height):
            raise ValueError(f"the image has {picture.size[0]} x {picture.size[1]} pixels, but the detections "
                             f"are from one with {width} x {height}")  # fmt: skip
        return _draw(self, picture)

    def save(self, path: str | PathLike) -> None:
        """Write the drawn image, or for a path that ends with .json the list of detections."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_list(), indent=1))
        else:
            self.draw().save(path)

    def to_list(self) -> list[dict[str, Any]]:
        """One dictionary per detection: "class", "score", "box_xyxy"."""
        return [
            {"class": found.name, "score": round(found.score, 4), "box_xyxy": [round(side, 1) for side in found.box]}
            for found in self
        ]

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO's results format: one dictionary per detection, boxes as x, y, width, height.

        Args:
            category_ids: of all classes; by default COCO's ids if the classes are COCO's, else 1, 2, ….
        """
        names = self.class_names or [self._name(number) for number in range(self.classes.max(initial=-1) + 1)]
        numbers = number_categories(names) if category_ids is None else category_ids
        return [
            {
                "image_id": image_id,
                "category_id": numbers[found.class_id],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": found.score,
            }
            for found in self
            for x1, y1, x2, y2 in [found.box]
        ]

    def to_dataframe(self) -> pandas.DataFrame:
        """A data frame with the columns name, score, x1, y1, x2, y2, class_id."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: pip install pandas") from error
        rows = [(found.name, found.score, *found.box, found.class_id) for found in self]
        return pandas.DataFrame(rows, columns=["name", "score", "x1", "y1", "x2", "y2", "class_id"])

    def to_supervision(self) -> supervision.Detections:
        """As `supervision.Detections`, for its annotators, trackers and zones."""
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs supervision: pip install 'dino-d2[data]'") from error
        return supervision.Detections(
            xyxy=self.boxes.reshape(-1, 4),
            confidence=self.scores,
            class_id=self.classes,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_label_studio(
        self,
        image: str | None = None,
        *,
        from_name: str = "label",
        to_name: str = "image",
        model_version: str = "dino_d2",
    ) -> dict[str, Any]:
        """A task of Label Studio with the detections as pre-annotations; a list of tasks is a file to import.

        Args:
            image: what Label Studio shows: a URL, or a path that it serves; by default the path or URL that the
                detections are from.
            from_name, to_name: names of `RectangleLabels` and `Image` in the labelling config. The task's data has
                the image under "image".
            model_version: shown beside the pre-annotations.

        Raises:
            ValueError: the detections are from an array, and no `image` is given.
        """
        image = self.image if image is None else image
        if not isinstance(image, str):
            raise ValueError("Label Studio needs a URL or a path: pass it to to_label_studio")
        height, width = self.image_size
        scale = np.array([100 / width, 100 / height] * 2)  # to percent
        limits = (self.boxes.reshape(-1, 4) * scale).clip(0, 100)
        corners, sides = limits[:, :2].tolist(), (limits[:, 2:] - limits[:, :2]).tolist()
        regions = [
            {
                "id": f"object_{number}",
                "type": "rectanglelabels",
                "from_name": from_name,
                "to_name": to_name,
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": dict(zip(("x", "y", "width", "height"), (*corner, *side), strict=True))
                | {"rotation": 0, "rectanglelabels": [name]},
                "score": score,
            }
            for number, (name, score, corner, side) in enumerate(
                zip(self.names, self.scores.tolist(), corners, sides, strict=True)
            )
        ]
        mean = float(self.scores.mean()) if len(self) else 0.0  # Label Studio sorts tasks by it
        prediction = {"model_version": model_version, "score": mean, "result": regions}
        return {"data": {"image": image}, "predictions": [prediction]}

    def to_instances(self) -> Instances:
        """As detectron2's `Instances`, with pred_boxes, scores and pred_classes."""
        import torch
        from detectron2.structures import Boxes, Instances

        instances = Instances(self.image_size)
        instances.pred_boxes = Boxes(torch.from_numpy(self.boxes.copy()))
        instances.scores = torch.from_numpy(self.scores.copy())
        instances.pred_classes = torch.from_numpy(self.classes.copy())
        return instances

    def __repr__(self) -> str:
        height, width = self.image_size
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        best = ", ".join(f"{found.name} {found.score:.2f}" for found in self[:3])
        return f"<{len(self)} detections in {width} x {height} pixels: {counts or 'nothing'}" + (
            f"; best {best}>" if len(self) else ">"
        )

    def _repr_png_(self) -> bytes | None:
        """Show the drawn image in a notebook."""
        if self.image is None:
            return None
        file = io.BytesIO()
        self.draw().save(file, "PNG")
        return file.getvalue()

    def _name(self, number: int) -> str:
        return self.class_names[number] if number < len(self.class_names) else f"class {number}"


def check_classes(names: Sequence[str], known: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one of the names is not known.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the classes are {', '.join(known)}"
            raise ValueError(f"unknown class {name}; {hint}")


def number_categories(class_names: Sequence[str]) -> Sequence[int]:
    """Category ids of all classes: COCO's ids if the classes are COCO's, else 1, 2, …."""
    is_coco = len(class_names) == 80 and (class_names[0], class_names[-1]) == FIRST_AND_LAST_OF_COCO
    return COCO_IDS if is_coco else range(1, len(class_names) + 1)


def as_picture(image: str | PathLike | Image | np.ndarray | None) -> Image:
    """A new PIL image in RGB, rotated according to its EXIF data.

    Raises:
        ValueError: the range of its pixel values is unknown; no image is given.
    """
    from PIL import Image

    from .orientation import as_seen

    if image is None:
        raise ValueError("the image was not kept with these detections: pass it to draw")
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        with Image.open(image) as file:
            return as_picture(file)
    return with_8_bits(as_seen(image), getattr(image, "filename", "") or "the image").convert("RGB")


def with_8_bits(picture: Image, name: str) -> Image:
    """Pictures of 16 bits with their upper 8, as PIL reads them in colour; pictures of 8 bits as they are.

    Args:
        picture: its mode tells.
        name: for the error.

    Raises:
        ValueError: the range of its pixel values is unknown.
    """
    from PIL import Image

    if not picture.mode.startswith(DEEP_MODES):
        return picture
    grey = np.asarray(picture)
    if picture.mode.startswith("F") or grey.min() < 0 or grey.max() >= 2**16:
        raise ValueError(
            f"{name} has pixel values of unknown range (PIL mode {picture.mode}): save it with 8 or 16 bits per channel"
        )
    return Image.fromarray((grey // 256).astype(np.uint8))


def _draw(detections: Detections, picture: Image) -> Image:
    found = list(reversed(list(detections)))  # the highest score on top
    return draw_boxes(
        picture,
        [detection.box for detection in found],
        [detection.class_id for detection in found],
        [f"{detection.name} {detection.score:.2f}" for detection in found],
    )


def draw_boxes(
    picture: Image, boxes: Sequence[Sequence[float]], class_ids: Sequence[int], texts: Sequence[str]
) -> Image:
    """Draw on the RGB image in place and return it.

    Args:
        boxes: x1, y1, x2, y2 in pixels, corners in any order; later ones are drawn on top.
        class_ids: determine the colours.
        texts: labels of the boxes.
    """
    from PIL import ImageDraw

    from .fonts import load_font

    longest = max(picture.size)
    line, font = max(2, longest // 400), load_font(max(12, longest // 65), texts)
    pen = ImageDraw.Draw(picture)
    for box, class_id, text in zip(boxes, class_ids, texts, strict=True):
        colour = COLOURS[class_id % len(COLOURS)]
        x1, x2 = sorted(box[::2])  # annotations may have negative sides
        y1, y2 = sorted(box[1::2])
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        left, _, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(max(x1, 0), max(picture.width - right - 2 * line, 0))
        y = y1 - bottom - line
        y = y if y >= 0 else min(max(y1, 0), picture.height)
        pen.rectangle((x, y, x + right - left + 2 * line, y + bottom + line), fill=colour)
        pen.text((x + line, y), text, fill=(0, 0, 0), font=font)
    return picture
