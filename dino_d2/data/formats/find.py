"""From a folder of photographs to the files that training and evaluation read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dino_d2.data.datasets import CocoFiles

from . import coco, voc, yolo
from .parts import Content, Part, hold_back

READERS = (coco.read, yolo.read, voc.read)
LAYOUTS = """\
  COCO        annotations/instances_train*.json and instances_val*.json, the images in train*/ and val*/ or images/;
              or train.json and val.json beside train/ and val/; or train/_annotations.coco.json (Roboflow)
  YOLO        data.yaml with names, train and val; images/train with labels/train, or train/images with train/labels
  Pascal VOC  JPEGImages/, Annotations/ and ImageSets/Main/train.txt; or train/ with an XML file beside each image
A part for evaluation (val, valid) may be missing, images without annotations are images without objects."""


@dataclass(frozen=True)
class FoundDataset:
    """layout: its name. train, val: the data. counts: images of each. notes: what a user should know of the reading."""

    layout: str
    train: CocoFiles
    val: CocoFiles
    counts: tuple[int, int]
    notes: tuple[str, ...]


def find_dataset(folder: Path, output: Path, may_replace: bool = True) -> FoundDataset:
    """Find out what the folder holds. The images stay where they are; annotations that are not COCO's as they are,
    are written to `output` as train.json and val.json.

    Without a part for evaluation a fifth of the images to train on is held back: always the same ones.

    Args:
        may_replace: write over other annotations in `output`, which are a run's that goes on if this is not allowed.

    Raises:
        FileNotFoundError: there is no such folder, or a part of the data is missing.
        ValueError: the folder has none of the layouts, or its files are not understood.
        ImportError: YOLO or Pascal VOC, and supervision, which reads them, is not installed.
        FileExistsError: `output` has other annotations.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    layout = next((found for read in READERS if (found := read(folder))), None)
    if layout is None:
        some = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} (it holds {some}) has none of the layouts that are looked for:\n{LAYOUTS}")
    parts, notes = dict(layout.parts), list(layout.notes)
    if "val" not in parts:
        parts["train"], parts["val"] = hold_back(parts["train"])
        notes.append(
            f"there is no part for evaluation: {len(parts['val'].content['images'])} photographs, a fifth chosen by a "
            "hash of their names, are held back and not trained on"
        )
    if layout.name == voc.NAME and any("difficult" in entry for entry in parts["val"].content["annotations"]):
        parts["val"] = Part(_with_crowds(parts["val"].content), parts["val"].images)
        notes.append("val: objects marked difficult are crowds, neither for nor against in AP; they are trained on")
    if not all(_can_be_evaluated(entry) for entry in parts["val"].content["annotations"]):
        parts["val"] = Part(_with_area(parts["val"].content), parts["val"].images)
        notes.append("val: annotations lack area or iscrowd: they get the area of their box and are no crowds")
    files = {name: _files(name, part, output, may_replace) for name, part in parts.items()}
    counts = len(parts["train"].content["images"]), len(parts["val"].content["images"])
    return FoundDataset(layout.name, files["train"], files["val"], counts, tuple(notes))


def _can_be_evaluated(entry: dict) -> bool:
    return {"area", "iscrowd"} <= entry.keys()


def _with_crowds(content: Content) -> Content:
    """Difficult objects as detectron2 has them: trained on, and forgiven by Pascal VOC's evaluation."""
    annotations = [entry | {"iscrowd": 1} if "difficult" in entry else entry for entry in content["annotations"]]
    return content | {"annotations": annotations}


def _with_area(content: Content) -> Content:
    def completed(entry: dict) -> dict:
        box = entry.get("bbox")  # faulty ones are left to the inspection of the data
        area = box[2] * box[3] if isinstance(box, list) and len(box) == 4 else 0
        return {"area": area, "iscrowd": 0, **entry}

    return content | {"annotations": [completed(entry) for entry in content["annotations"]]}


def _files(name: str, part: Part, output: Path, may_replace: bool) -> CocoFiles:
    if part.file is not None:
        return CocoFiles(part.file, part.images)
    file, text = output / f"{name}.json", json.dumps(part.content)
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        if file.exists() and not may_replace:
            raise FileExistsError(
                f"{file} is of other data: a run goes on with its own; another output begins a new one"
            )
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return CocoFiles(file, part.images)
