"""What the readers of the layouts have in common: parts of a dataset in COCO's format, in memory."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # part: its names
HELD_BACK = 5  # one photograph of so many is evaluated on, where no part is for that
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # of EXIF
NAMED = 3  # examples in an error

Content = dict[str, list[dict[str, Any]]]  # "images", "annotations", "categories"


@dataclass(frozen=True)
class Part:
    """content: in COCO's format. images: folder that its `file_name`s are relative to. file: which has that content;
    None: there is none yet."""

    content: Content
    images: Path
    file: Path | None = None


@dataclass
class Layout:
    """name: for people. parts: "train" and perhaps "val". notes: what a user should know about the reading."""

    name: str
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A photograph with its objects. file_name: relative to the image folder. size: width, height. boxes: (n, 4)
    x1, y1, x2, y2 in pixels. labels: n, counted from 0. difficult: n, Pascal VOC's mark of what is hard to see."""

    file_name: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: Sequence[int]
    difficult: Sequence[bool]


def as_coco(pictures: Iterable[Picture], names: Sequence[str]) -> Content:
    """Images and annotations are numbered from 1 as they come, categories as their labels, from 1. Difficult objects
    are marked so."""
    images, annotations = [], []
    for number, picture in enumerate(pictures, start=1):
        width, height = picture.size
        images.append({"id": number, "file_name": picture.file_name, "width": width, "height": height})
        for box, label, difficult in zip(picture.boxes.tolist(), picture.labels, picture.difficult, strict=True):
            x, y, right, bottom = (round(side, 2) for side in box)
            sides = [x, y, round(right - x, 2), round(bottom - y, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": sides,
                    "area": round(sides[2] * sides[3], 2),
                    "iscrowd": 0,
                }
                | ({"difficult": 1} if difficult else {})
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def pictures_in(folder: Path, recursive: bool = False) -> list[Path]:
    """Files with the suffix of an image, sorted."""
    found = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())


def sizes_of(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height as the images are seen, turned as their EXIF data say. Only their headers are read.

    Raises:
        ValueError: files that are no images.
    """
    sizes, broken = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
                sizes.append(image.size[::-1] if turned else image.size)
        except (
            Image.DecompressionBombError,
            UnidentifiedImageError,
            OSError,
            SyntaxError,
        ):  # the last: of broken PNG files
            broken.append(path)
    if broken:
        some = ", ".join(map(str, broken[:NAMED])) + (", …" if len(broken) > NAMED else "")
        raise ValueError(f"{len(broken)} files cannot be read as images: {some}; replace or remove them")
    return sizes


def hold_back(part: Part) -> tuple[Part, Part]:
    """A fifth of the photographs for evaluation, by a hash of their names, so that it is always the same ones.

    Copies of one photograph that Roboflow has augmented (`name.rf.HASH.jpg`) stay together.

    Returns:
        what is left to train on, what is held back.

    Raises:
        ValueError: there is a single photograph.
    """
    digests = {
        image["id"]: hashlib.sha256(str(image["file_name"]).split(".rf.")[0].encode()).hexdigest()
        for image in part.content["images"]
    }
    ordered = sorted(set(digests.values()))
    if len(ordered) < 2:
        raise ValueError(f"{part.images} has a single photograph, of which none can be held back for evaluation")
    last = ordered[max(len(ordered) // HELD_BACK, 1) - 1]
    held = {number for number, digest in digests.items() if digest <= last}
    return _selected(part, digests.keys() - held), _selected(part, held)


def _selected(part: Part, ids: set) -> Part:
    content = {
        "images": [image for image in part.content["images"] if image["id"] in ids],
        "annotations": [entry for entry in part.content["annotations"] if entry.get("image_id") in ids],
        "categories": part.content["categories"],
    }
    return Part(content, part.images)


def require_supervision(layout: str) -> None:
    """
    Raises:
        ImportError: what reads YOLO and Pascal VOC is not installed.
    """
    if importlib.util.find_spec("supervision") is None:
        raise ImportError(
            f'{layout} is read by supervision, which is not installed: pip install "supervision>=0.31,<1"'
        )
