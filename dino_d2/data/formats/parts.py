"""Common code of the layout readers: splits of a dataset in COCO format, in memory."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise
from operator import itemgetter, not_
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dino_d2.data.coco import ENCODING
from dino_d2.data.images import SUFFIXES
from dino_d2.orientation import size_as_seen

FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # names of each split
HELD_OUT = 5  # one in this many images is held out if there is no validation split
NAMED = 3  # examples in an error

Content = dict[str, list[dict[str, Any]]]  # "images", "annotations", "categories"


@dataclass(frozen=True)
class Part:
    """A split of a dataset.

    content: in COCO format. images: folder that its `file_name`s are relative to. file: the annotation file with that
    content; None: not written yet."""

    content: Content
    images: Path
    file: Path | None = None


@dataclass
class Layout:
    """A dataset as read. name: of the layout. parts: "train" and perhaps "val". notes: remarks for the user."""

    name: str
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """An image with its objects. file_name: relative to the image folder. size: width, height that the boxes belong
    to. boxes: (n, 4) x1, y1, x2, y2 in pixels. labels: n, counted from 0. difficult: n, Pascal VOC's flag for hard
    objects."""

    file_name: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: Sequence[int]
    difficult: Sequence[bool]


def as_coco(pictures: Iterable[Picture], names: Sequence[str]) -> Content:
    """Convert to COCO format. Ids of images, annotations and categories start at 1; difficult objects are marked."""
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


def sizes_of(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Width and height after EXIF rotation.

    Raises:
        ValueError: some files are not images.
    """
    sizes, broken = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.append(size_as_seen(image))
        except (
            Image.DecompressionBombError,
            UnidentifiedImageError,
            OSError,
            SyntaxError,
        ):  # SyntaxError: broken PNG files
            broken.append(path)
    if broken:
        some = ", ".join(map(str, broken[:NAMED])) + (", …" if len(broken) > NAMED else "")
        raise ValueError(f"{len(broken)} files cannot be read as images: {some}; replace or remove them")
    return sizes


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank, without spaces around them.

    Raises:
        ValueError: the file is not UTF-8, with or without a byte order mark.
    """
    try:
        lines = file.read_text(encoding=ENCODING).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8 ({error}): save it as one") from error
    return [line.strip() for line in lines if line.strip()]


def refuse_shared(entries: Iterable[tuple[Path, Path]]) -> None:
    """Every image must have a label file of its own: a.jpg and a.png have not.

    Args:
        entries: images with their label files.

    Raises:
        ValueError: two images share one.
    """
    for (one, label), (other, same) in pairwise(sorted(set(entries), key=itemgetter(1, 0))):
        if label == same:
            raise ValueError(
                f"{one.parent}: {one.name} and {other.name} would share {label}: rename or remove one of them"
            )


def note_orphans(kind: str, files: Sequence[Path]) -> list[str]:
    """A remark about label files of this kind that have objects, but belong to no image; empty without any."""
    if not files:
        return []
    suffixes = ", ".join(sorted(SUFFIXES))
    return [f"{kind} with objects, but without an image ({suffixes}): {len(files)}, such as {files[0]}; not used"]


def hold_out(part: Part) -> tuple[Part, Part]:
    """Split off a fifth of the images for evaluation, by a hash of their names, so always the same ones.

    It is a fifth of those with objects and of those without. Roboflow's augmented copies of one image
    (`name.rf.HASH.jpg`) stay together. Faulty entries stay where the inspection of the data finds them: images with the
    same id together, and annotations of no image in the training part.

    Returns:
        the rest for training, and the held-out part.

    Raises:
        ValueError: there is only one image, or only one with objects.
    """
    images, annotations = part.content["images"], part.content["annotations"]
    groups = _groups(images)
    used = _ids(annotations, "image_id")
    with_objects = {group for image, group in zip(images, groups, strict=True) if _ids([image], "id") & used}
    first = with_objects or set(groups)
    if len(first) < 2:
        what = "image with objects" if with_objects else "image"
        raise ValueError(f"{part.images} has only one {what}, so none can be held out for evaluation")
    rest = set(groups) - first
    of_rest = len(rest) // HELD_OUT
    of_first = max(len(set(groups)) // HELD_OUT - of_rest, 1)
    held = {*sorted(first)[:of_first], *sorted(rest)[:of_rest]}
    held_images = [group in held for group in groups]
    ids = _ids(compress(images, held_images), "id")
    held_annotations = [bool(_ids([entry], "image_id") & ids) for entry in annotations]
    return (
        _chosen(part, map(not_, held_images), map(not_, held_annotations)),
        _chosen(part, held_images, held_annotations),
    )


def _groups(images: Sequence[dict[str, Any]]) -> list[str]:
    """For each image the hash of the name of those that it stays together with."""
    name_of: dict[str, str] = {}  # by id
    digests = []
    for image in images:
        name = str(image.get("file_name")).split(".rf.")[0]
        name = name_of.setdefault(repr(image.get("id", name)), name)
        # A name that is not UTF-8 has surrogates, which cannot be encoded otherwise.
        digests.append(hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest())
    return digests


def _chosen(part: Part, images: Iterable[bool], annotations: Iterable[bool]) -> Part:
    chosen = {
        "images": list(compress(part.content["images"], images)),
        "annotations": list(compress(part.content["annotations"], annotations)),
    }
    return Part(part.content | chosen, part.images)


def _ids(entries: Iterable[dict[str, Any]], key: str) -> set[int | str]:
    """The valid ids under this key."""
    return {number for entry in entries if isinstance(number := entry.get(key), int | str)}


def require_supervision(layout: str) -> None:
    """
    Raises:
        ImportError: supervision, which reads YOLO and Pascal VOC, is not installed.
    """
    if importlib.util.find_spec("supervision") is None:
        raise ImportError(
            f'reading {layout} needs supervision, which is not installed: pip install "supervision>=0.31,<1"'
        )
