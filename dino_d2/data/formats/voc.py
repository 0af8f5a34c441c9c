"""Pascal VOC: one XML file per image, in the devkit's folders or beside the image (Roboflow, labelImg)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from dino_d2.data.images import images_in

from .parts import (
    FOLDERS,
    Layout,
    Part,
    Picture,
    as_coco,
    note_orphans,
    read_lines,
    refuse_shared,
    require_supervision,
    sizes_of,
)

NAME = "Pascal VOC"
PAIRS = (("JPEGImages", "Annotations"), ("images", "annotations"), ("images", "Annotations"), (".", "."))
LISTS = "ImageSets/Main"

Entry = tuple[Path, Path]  # paths of an image and its annotations, which may not exist


def read(folder: Path, needed: Sequence[str]) -> Layout | None:
    """Read the folder if it has this layout with one of the needed splits, else return None.

    Raises:
        ValueError, FileNotFoundError: the layout matches, but files are missing or invalid.
        ImportError: supervision is not installed.
    """
    layout = Layout(NAME, {})
    parts = _parts(folder, needed, layout.notes)
    if not any(part in parts for part in needed):
        return None
    require_supervision("Pascal VOC's format")
    seen: list[str] = []
    pictures = {part: _read(*parts[part], seen) for part in ("train", "val") if part in parts}
    names = sorted(seen)
    if not names:
        raise ValueError(f"{folder}: the annotations have no objects")
    for part, found in pictures.items():
        found = [replace(picture, labels=[names.index(seen[label]) for label in picture.labels]) for picture in found]
        layout.parts[part] = Part(as_coco(found, names), parts[part][0])
    if "test" in parts:
        layout.notes.append("the test split is not used")
    return layout


def _parts(folder: Path, needed: Sequence[str], notes: list[str]) -> dict[str, tuple[Path, list[Entry]]]:
    """The image folder and the entries of each split."""
    found = {}
    for part, names in FOLDERS.items():
        pair = next((pair for name in names if (pair := _folders(folder / name))), None)
        if pair:
            found[part] = (pair[0], _entries(*pair, notes))
    whole = _folders(folder)
    if found or not whole:
        return found
    return {part: (whole[0], entries) for part, entries in _divided(folder, _entries(*whole, notes), needed).items()}


def _divided(folder: Path, everything: Sequence[Entry], needed: Sequence[str]) -> dict[str, list[Entry]]:
    """The entries of each split by the lists of the folder. Without one for training it is what the others leave."""
    by_id = {image.stem: (image, xml) for image, xml in everything}
    found = {part: entries for part in ("train", "val") if (entries := _listed(folder, part, by_id))}
    test = _listed(folder, "test", by_id, partly=True)
    if not any(part in found for part in needed):
        others = {*found.get("val", []), *test}
        found["train"] = [x for x in _listed(folder, "trainval", by_id) or everything if x not in others]
        if not found["train"]:
            raise ValueError(f"{folder / LISTS}: val.txt and test.txt leave no image for training")
    return found | ({"test": test} if test else {})


def _folders(folder: Path) -> tuple[Path, Path] | None:
    """The folders of images and annotations."""
    for images, xml in PAIRS:
        if (folder / images).is_dir() and any((folder / xml).glob("*.xml")):
            return folder / images, folder / xml
    return None


def _entries(images: Path, annotations: Path, notes: list[str]) -> list[Entry]:
    found = [(image, annotations / f"{image.stem}.xml") for image in images_in(images)]
    refuse_shared(found)
    if not any(xml.is_file() for _, xml in found):
        raise FileNotFoundError(f"{images}: no annotations of its images found in {annotations}")
    others = sorted(set(annotations.glob("*.xml")) - {xml for _, xml in found})
    notes += note_orphans("XML files", [xml for xml in others if b"<object" in xml.read_bytes()])
    return found


def _listed(folder: Path, part: str, by_id: Mapping[str, Entry], partly: bool = False) -> list[Entry]:
    """What a list names. partly: images that are not there are left out."""
    file = folder / LISTS / f"{part}.txt"
    lines = read_lines(file) if file.is_file() else []
    names = {line: next((name for name in _names(line) if name in by_id), None) for line in lines}
    missing = [line for line, name in names.items() if name is None]
    if missing and not partly:
        images = next(iter(by_id.values()))[0].parent
        raise FileNotFoundError(f"{file.parent}: {file.name} names {missing[0]}, but {images} has no such image")
    return [by_id[name] for name in names.values() if name is not None]


def _names(line: str) -> tuple[str, str]:
    """What a line of a list may mean: names have spaces, or 1, 0 or -1 after them in the lists of one class."""
    return line, line.rsplit(maxsplit=1)[0]


def _read(images: Path, entries: Sequence[Entry], names: list[str]) -> list[Picture]:
    """Read the images, with labels as indices into `names`, to which new names are added."""
    sizes = sizes_of([image for image, _ in entries])
    return [
        _picture(image.relative_to(images).as_posix(), size, xml, names)
        for (image, xml), size in zip(entries, sizes, strict=True)
    ]


def _picture(file_name: str, size: tuple[int, int], xml: Path, names: list[str]) -> Picture:
    from defusedxml.ElementTree import parse  # imported late: only needed here
    from supervision.dataset.formats.pascal_voc import detections_from_xml_obj

    if not xml.is_file():  # background image
        return Picture(file_name, size, np.zeros((0, 4)), [], [])
    try:
        root = parse(xml).getroot()
        for name in root.findall("object/name"):
            name.text = (name.text or "").strip() or None
        objects, names[:] = detections_from_xml_obj(root, names, size)
        drawn_on = _annotated_size(root) or size
    except (SyntaxError, ValueError) as error:  # SyntaxError: not XML
        raise ValueError(f"{xml}: {error}") from error
    difficult = [(entry.findtext("difficult") or "").strip() == "1" for entry in root.findall("object")]
    return Picture(file_name, drawn_on, objects.xyxy, objects.class_id.tolist(), difficult)


def _annotated_size(root: Element) -> tuple[int, int] | None:
    """The width and height that the boxes belong to; None if unknown, for which some tools write 0.

    It is not that of the image if the image was resized later, or if the tool ignored EXIF rotation.
    """
    width, height = (float((root.findtext(f"size/{side}") or "").strip() or 0) for side in ("width", "height"))
    return (round(width), round(height)) if 0 < width < math.inf and 0 < height < math.inf else None
