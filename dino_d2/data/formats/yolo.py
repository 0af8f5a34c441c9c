"""YOLO: a data.yaml with the class names, and a text file per image (Ultralytics, Roboflow)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dino_d2.data.coco import ENCODING
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

FILES = ("data.yaml", "data.yml", "dataset.yaml")


def read(folder: Path, needed: Sequence[str]) -> Layout | None:
    """Read the folder if it has this layout with one of the needed splits, else return None.

    Raises:
        ValueError, FileNotFoundError: the layout matches, but files are missing or invalid.
        ImportError: supervision is not installed.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    require_supervision("YOLO's format")
    settings = _settings(file)
    layout = Layout("YOLO", {})
    folders = {part: _image_folders(file, settings, part, needed, layout.notes) for part in FOLDERS}
    if not any(folders[part] for part in needed):
        wanted = " or ".join(f'"{part}"' for part in needed)
        raise ValueError(f"{file} does not give {wanted}, a folder of images that exists")
    if folders["val"] and folders["val"] == folders["train"]:
        layout.notes.append(f"{file.name}: val is the same as train: AP will say nothing about new images")
    names, keypoints = _class_names(file, settings), _keypoint_values(settings)
    roots = [Path(os.path.normpath(root)) for root in (folder, folder / _root(settings))]
    for part in ("train", "val"):
        if folders[part]:
            layout.parts[part] = _read_part(folders[part], roots, names, keypoints, layout.notes)
    if folders["test"]:
        layout.notes.append(f"{folders['test'][0]} is a test split: not used")
    return layout


def _settings(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding=ENCODING)
        settings, as_written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must give names, train and val")
    return settings | {"names": as_written.get("names")}  # not False for a class "no"


def _class_names(file: Path, settings: dict[str, Any]) -> list[str]:
    """Class names in order of their indices, from a list or a dictionary with keys from 0."""
    names = settings.get("names")
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise ValueError(f'{file}: "names" must be a list, or a dictionary with keys from 0; it is {names!r}')
    return [str(name) for name in names]


def _keypoint_values(settings: dict[str, Any]) -> int:
    """Number of values after the box in each line of a pose dataset."""
    shape = settings.get("kpt_shape")
    return shape[0] * shape[1] if isinstance(shape, list) and len(shape) == 2 else 0


def _root(settings: dict[str, Any]) -> str:
    """Folder of the dataset, relative to that of the file."""
    return str(settings.get("path") or "")


def _image_folders(
    file: Path, settings: dict[str, Any], part: str, needed: Sequence[str], notes: list[str]
) -> list[Path]:
    """The image folders of a split; empty if the file does not give it. Those of a split that can be done without may
    be missing."""
    entries = next((settings[name] for name in FOLDERS[part] if settings.get(name)), [])
    entries = entries if isinstance(entries, list) else [entries]
    folders = []
    for entry in map(str, entries):
        place = _resolve(file.parent, _root(settings), entry)
        if place is None and tuple(needed) == (part,):
            raise FileNotFoundError(f"{file}: {part} is {entry}, but that folder does not exist")
        if place is None and part != "test":
            notes.append(f"{file.name}: {part} is {entry}, which does not exist: not used")
        elif place is not None:
            folders.append(place)
    return folders


def _resolve(root: Path, path: str, entry: str) -> Path | None:
    """The folder that `entry` means: as written, else by ever shorter suffixes, because many files hold paths from
    another machine, or `../train/images` for `train/images`. Folders outside of `root` are tried last."""
    written = [Path(os.path.normpath(root / path / entry)), Path(os.path.normpath(root / entry))]
    inside = [place for place in written if place.is_relative_to(os.path.normpath(root))]
    words = [word for word in PurePosixPath(entry.replace("\\", "/")).parts if word not in ("..", "/")]
    ends = [root.joinpath(*words[first:]) for first in range(len(words))]
    ends = [place for place in ends if place != root / "images"]  # ambiguous without the name of a split
    return next((place for place in (*inside, *ends, *written) if place.is_dir()), None)


def _read_part(
    folders: Sequence[Path], roots: Sequence[Path], names: Sequence[str], keypoints: int, notes: list[str]
) -> Part:
    pictures = [(picture, folder) for folder in folders for picture in images_in(folder, recursive=True)]
    if not pictures:
        raise ValueError(f"no images found in {', '.join(map(str, folders))}")
    paths = [picture for picture, _ in pictures]
    labels = [_label_file(picture, folder, roots) for picture, folder in pictures]
    refuse_shared((path, label) for path, label in zip(paths, labels, strict=True) if label.is_file())
    if not any(label.is_file() for label in labels):
        raise FileNotFoundError(f"{folders[0]}: no image has a label file; the first would be {labels[0]}")
    places = {_label_file(folder / "any", folder, roots).parent for folder in folders}
    others = {file for place in places for file in place.rglob("*.txt")} - set(labels)
    notes += note_orphans("label files", [file for file in sorted(others) if _has_objects(file)])
    root = Path(os.path.commonpath(folders))
    found = [
        _picture(path.relative_to(root).as_posix(), size, label, names, keypoints)
        for path, size, label in zip(paths, sizes_of(paths), labels, strict=True)
    ]
    return Part(as_coco(found, names), root)


def _label_file(picture: Path, folder: Path, roots: Sequence[Path]) -> Path:
    """In `labels` if the images are in `images`; else in a folder `labels` beside the image, or beside the image.

    Folders above the dataset do not count: their name may be `images` too.
    """
    inside = picture.relative_to(folder).with_suffix(".txt")
    place = Path(os.path.normpath(folder))
    root = next((root for root in roots if place.is_relative_to(root)), Path(place.anchor))
    words = list(place.relative_to(root).parts)
    if "images" in words:
        words[len(words) - 1 - words[::-1].index("images")] = "labels"
        return root.joinpath(*words) / inside
    return folder / "labels" / inside if (folder / "labels").is_dir() else folder / inside


def _has_objects(file: Path) -> bool:
    """Whether a text file is a label file with objects, and not a list of classes or the like."""
    words = file.read_text(encoding=ENCODING, errors="replace").strip().partition("\n")[0].split()
    try:
        return len([float(word) for word in words]) >= 5  # the class and a box
    except ValueError:
        return False


def _picture(file_name: str, size: tuple[int, int], label: Path, names: Sequence[str], keypoints: int) -> Picture:
    from supervision.dataset.formats.yolo import yolo_annotations_to_detections  # imported late: slow

    lines = read_lines(label) if label.is_file() else []  # no file: background image
    words = [line.split() for line in lines]
    if keypoints:
        words = [line[:5] if len(line) == 5 + keypoints else line for line in words]
    try:
        objects = yolo_annotations_to_detections([" ".join(line) for line in words], size, with_masks=False)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    numbers = [] if objects.class_id is None else objects.class_id.tolist()
    wrong = [number for number in numbers if not 0 <= number < len(names)]
    if wrong:
        raise ValueError(f"{label} has class {wrong[0]}, but data.yaml has {len(names)} names, counted from 0")
    return Picture(file_name, size, objects.xyxy, numbers, [False] * len(numbers))
