"""Stream annotation files in COCO format entry by entry, so that files of gigabytes fit in memory."""

from __future__ import annotations

import codecs
import json
import logging
import marshal
import os
import re
from array import array
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

CHUNK = 2**20  # characters to read at a time
LONGEST = 2**26  # characters of one entry; an incomplete entry longer than this is an error
ENCODING = "utf-8-sig"  # UTF-8, with or without a byte order mark
SPACE = re.compile(r"[ \t\n\r]*")

logger = logging.getLogger(__name__)


def stream_lists(path: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yield name and entries of each list in the object of a JSON file. Read the entries before the next list.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    with PathManager.open(path, "r", encoding=ENCODING) as file:
        text = _JsonText(path, file)
        if text.peek() != "{":
            text.value()  # JSON, but no lists
            return
        for _ in text.separated("{", "}"):
            name = text.value()
            text.expect(":")
            if text.peek() == "[":
                entries = (text.value() for _ in text.separated("[", "]"))
                yield str(name), entries
                for _ in entries:  # skip what was not read
                    pass
            else:
                text.value()
        if text.peek():
            raise text.error("unexpected data after the end", text.at)


def has_byte_order_mark(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins with UTF-8's byte order mark, which pycocotools does not read."""
    with PathManager.open(str(path), "rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def stream_results(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the entries of a JSON file that is a list, such as detections in COCO's results format.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON, or no list; the message names it.
    """
    with PathManager.open(str(path), "r", encoding=ENCODING) as file:
        text = _JsonText(str(path), file)
        for _ in text.separated("[", "]"):
            yield text.value()
        if text.peek():
            raise text.error("unexpected data after the end", text.at)


class _JsonText:
    """A buffer of the file, parsed from position `at` on."""

    def __init__(self, path: str, file: TextIO):
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self.before = 0  # characters of the file before `text`
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not whitespace; empty at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read():
                return ""

    def expect(self, *characters: str) -> str:
        found = self.peek()
        if found not in characters:
            raise self.error(f"expected {' or '.join(characters)}", self.at)
        self.at += 1
        return found

    def separated(self, begin: str, end: str) -> Iterator[None]:
        """Yield before each entry between the delimiters, for the caller to read it."""
        self.expect(begin)
        if self.peek() == end:
            self.expect(end)
            return
        yield
        while self.expect(",", end) == ",":
            yield

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LONGEST or not self._read():
                    raise self.error(error.msg, error.pos) from error
                continue
            if end < len(self.text) or not self._read():  # a number may continue beyond the buffer
                self.at = end
                return value

    def error(self, message: str, at: int) -> ValueError:
        return ValueError(f"{self.path} is not JSON: {message} at character {self.before + at}")

    def _read(self) -> bool:
        """Double the buffer, so that a long entry is not parsed too often."""
        try:
            more = self.file.read(max(CHUNK, len(self.text) - self.at))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from error
        if more:
            self.text, self.before, self.at = self.text[self.at :] + more, self.before + self.at, 0
        return bool(more)


class CocoRecords(Sequence):
    """detectron2's dataset dicts of a file in COCO format, as from its `load_coco_json`, but with boxes only.

    Without polygons and keypoints; images, objects, their order, errors and the metadata it sets ("thing_classes",
    "thing_dataset_id_to_contiguous_id") are the same. Each record is created on access; until then an object takes
    about 100 bytes.
    """

    def __init__(self, json_file: str, image_root: str, dataset_name: str):
        """
        Raises:
            ValueError: the file is not JSON or not in COCO format.
            AssertionError: annotation ids are not unique.
        """
        self.json_file, self.image_root = json_file, image_root
        self.has_annotations = False  # True even if the list is empty
        path = PathManager.get_local_path(json_file)
        images: dict[Hashable, tuple[str, int, int]] = {}
        objects = _Objects()
        categories: dict[int, str] = {}
        for name, entries in stream_lists(path):
            if name == "images":
                images = {entry["id"]: (entry["file_name"], entry["height"], entry["width"]) for entry in entries}
            elif name == "annotations":
                self.has_annotations = True
                for entry in entries:
                    objects.add(entry)
            elif name == "categories":
                categories = {entry["id"]: entry["name"] for entry in entries}
        if not images or not categories:
            raise ValueError(f'{json_file} is not in COCO format: it has no "images" or no "categories"')

        self.class_of = {number: place for place, number in enumerate(sorted(categories))}
        _set_classes(dataset_name, [categories[number] for number in self.class_of], self.class_of)
        self.ids = sorted(images)
        self.images = [images[number] for number in self.ids]
        self.objects = objects
        self.order, self.ends = objects.by_image(self.ids)
        if len(self.order) < len(objects):
            logger.warning(
                f"{json_file} contains {len(objects)} annotations, but only {len(self.order)} of them match to images "
                "in the file."
            )
        if "minival" not in json_file and objects.repeat_ids(self.order):  # as in detectron2: minival repeats ids
            raise AssertionError(f"Annotation ids in '{json_file}' are not unique!")
        logger.info(f"Loaded {len(self.images)} images in COCO format from {json_file}")
        if objects.without_polygon:
            logger.warning(
                f"Skipped {objects.without_polygon} objects without a valid polygon; dino-d2 check lists them"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        file_name, height, width = self.images[index]
        begin = self.ends[index - 1] if index else 0
        found = [self._object(self.objects[place], self.ids[index]) for place in self.order[begin : self.ends[index]]]
        return {
            "file_name": os.path.join(self.image_root, file_name),
            "height": height,
            "width": width,
            "image_id": self.ids[index],
            "annotations": [entry for entry in found if entry is not None],
        }

    def _object(self, entry: dict[str, Any], image_id: Hashable) -> dict[str, Any] | None:
        if entry.pop("ignore", 0) != 0:
            raise AssertionError(f'"ignore" in COCO json file is not supported (image {image_id}): remove it')
        if "bbox" in entry and len(entry["bbox"]) == 0:
            raise ValueError(
                f"One annotation of image {image_id} contains empty 'bbox' value! "
                "This json does not have valid COCO format."
            )
        if not entry.pop(HAS_POLYGON):
            return None
        category = entry["category_id"]
        if category not in self.class_of:
            raise KeyError(
                f"Encountered category_id={category} but this id does not exist in 'categories' of the json file."
            )
        return entry | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": self.class_of[category]}


FIELDS = ("iscrowd", "bbox", "category_id", "ignore")  # of an annotation
HAS_POLYGON = "has polygon"


class _Objects:
    """Annotations stored compactly: the used fields as bytes, and the index of the image."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.ends = array("q", [0])
        self.images = array("q")
        self.ids = array("q")
        self.number_of: dict[Hashable, int] = {}  # index of each image id, in order of appearance
        self.without_polygon = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return marshal.loads(memoryview(self.content)[self.ends[place] : self.ends[place + 1]])

    def add(self, entry: dict[str, Any]) -> None:
        has_polygon = not has_no_valid_polygon(entry.get("segmentation"))
        self.without_polygon += not has_polygon
        fields = {key: entry[key] for key in FIELDS if entry.get(key) is not None}  # "iscrowd": null is no crowd
        self.content += marshal.dumps(fields | {HAS_POLYGON: has_polygon})
        self.ends.append(len(self.content))
        self.images.append(self.number_of.setdefault(entry["image_id"], len(self.number_of)))
        number = entry["id"]
        self.ids.append(number if isinstance(number, int) and abs(number) < 2**63 else hash(number))

    def by_image(self, ids: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the objects sorted by image, in file order within each, and the end of each image's range."""
        rank_of_number = np.full(len(self.number_of), len(ids), dtype=np.int64)  # last: unknown images
        for rank, image_id in enumerate(ids):
            if image_id in self.number_of:
                rank_of_number[self.number_of[image_id]] = rank
        ranks = rank_of_number[np.asarray(self.images)]
        ends = np.bincount(ranks, minlength=len(ids) + 1)[: len(ids)].cumsum()
        return np.argsort(ranks, kind="stable")[: ends[-1]], ends

    def repeat_ids(self, places: np.ndarray) -> bool:
        ids = np.sort(np.asarray(self.ids)[places])
        return bool((ids[1:] == ids[:-1]).any())


def has_no_valid_polygon(segmentation: object) -> bool:
    """detectron2's rule for objects that it skips; no segmentation at all is valid."""
    polygons = segmentation if isinstance(segmentation, list) else []
    return bool(polygons) and not any(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in polygons)


def _set_classes(dataset_name: str, names: list[str], class_of: dict[int, int]) -> None:
    if (min(class_of), max(class_of)) != (1, len(class_of)) and "coco" not in dataset_name:
        logger.warning(
            f"{dataset_name}: category ids are not 1 to {len(class_of)}; classes are numbered in their order"
        )
    metadata = MetadataCatalog.get(dataset_name)
    metadata.thing_classes = names
    metadata.thing_dataset_id_to_contiguous_id = class_of
