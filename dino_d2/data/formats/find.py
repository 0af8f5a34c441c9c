"""Find the dataset in a folder and convert it for training and evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dino_d2.data.coco import has_byte_order_mark
from dino_d2.data.datasets import CocoFiles

from . import coco, voc, yolo
from .parts import Content, Part, hold_out

READERS = (coco.read, yolo.read, voc.read)
LAYOUTS = """\
  COCO        annotations/instances_train*.json and instances_val*.json, the images in train*/ and val*/ or images/;
              or train.json and val.json beside train/ and val/; or train/_annotations.coco.json (Roboflow)
  YOLO        data.yaml with names, train and val; images/train with labels/train, or train/images with train/labels
  Pascal VOC  JPEGImages/, Annotations/ and ImageSets/Main/train.txt; or train/ with an XML file beside each image
The validation split (val, valid) is optional. Images without annotations are background images."""


@dataclass(frozen=True)
class FoundDataset:
    """A dataset found in a folder.

    layout: its name. train, val: the data; train is None if it is only evaluated on. counts: number of images in each.
    notes: remarks for the user."""

    layout: str
    train: CocoFiles | None
    val: CocoFiles
    counts: tuple[int, int]
    notes: tuple[str, ...]


def find_dataset(folder: Path, output: Path, may_replace: bool = True, training: bool = True) -> FoundDataset:
    """Find the dataset in `folder`. Images stay in place; annotations that had to be converted or changed are written
    to `output` as train.json and val.json.

    Without a validation split a fifth of the training images is held out, always the same ones.

    Args:
        may_replace: allow overwriting different annotations in `output`; False if a run there is to be resumed.
        training: False if the data are only evaluated on. A validation split is enough then, and without one all images
            are used.

    Raises:
        FileNotFoundError: the folder or part of the data does not exist.
        ValueError: the folder has no known layout, its files are invalid, or annotations would be written among them.
        ImportError: the layout is YOLO or Pascal VOC, and supervision is not installed.
        FileExistsError: `output` has different annotations.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist")
    needed = ("train",) if training else ("val", "train")
    layout = next((found for read in READERS if (found := read(folder, needed))), None)
    if layout is None:
        some = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} (containing {some}) has none of the supported layouts:\n{LAYOUTS}")
    parts, notes = dict(layout.parts), list(layout.notes)
    if not training:
        if "val" not in parts:
            notes.append(
                f"no validation split: all {len(parts['train'].content['images'])} images are evaluated on, including "
                "those that the model was trained on, if any"
            )
        parts = {"val": parts.get("val") or parts["train"]}
    elif "val" not in parts:
        parts["train"], parts["val"] = hold_out(parts["train"])
        notes.append(
            f"no validation split: {len(parts['val'].content['images'])} images, a fifth chosen by a hash of their "
            "names, are held out for evaluation"
        )
    if layout.name == voc.NAME and any("difficult" in entry for entry in parts["val"].content["annotations"]):
        parts["val"] = Part(_with_crowds(parts["val"].content), parts["val"].images)
        in_training = "; train: they are used" if training else ""
        notes.append(f"val: objects marked difficult are treated as crowds, which AP ignores{in_training}")
    if parts["val"].file is not None and has_byte_order_mark(parts["val"].file):
        parts["val"] = Part(parts["val"].content, parts["val"].images)  # to be written without it
        notes.append("val: evaluation cannot read the byte order mark: using a copy without it")
    if output.resolve() == folder.resolve() and any(part.file is None for part in parts.values()):
        raise ValueError(f"annotations would be written into {output}, which holds the data: choose another folder")
    files = {name: _files(name, part, output, may_replace) for name, part in parts.items()}
    train, val = (len(parts[name].content["images"]) if name in parts else 0 for name in ("train", "val"))
    return FoundDataset(layout.name, files.get("train"), files["val"], (train, val), tuple(notes))


def _with_crowds(content: Content) -> Content:
    """Mark difficult objects as crowds, which evaluation ignores, as Pascal VOC's does."""
    annotations = [entry | {"iscrowd": 1} if "difficult" in entry else entry for entry in content["annotations"]]
    return content | {"annotations": annotations}


def _files(name: str, part: Part, output: Path, may_replace: bool) -> CocoFiles:
    if part.file is not None:
        return CocoFiles(part.file, part.images)
    file, text = output / f"{name}.json", json.dumps(part.content)
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        if file.exists() and not may_replace:
            raise FileExistsError(
                f"{file} is from different data: resume the run with its own data, or choose another output folder"
            )
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return CocoFiles(file, part.images)
