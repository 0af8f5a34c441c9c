"""COCO's layout, common variants of it, and Roboflow's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino_d2.data.datasets import read_coco

from .parts import FOLDERS, Layout, Part

# Where to look for the annotations of a split named {}; the first match is used.
PLACES = (
    "annotations/instances_{}*.json",
    "instances_{}*.json",
    "annotations/{}.json",
    "annotations/{}*.json",
    "{}.json",
    "{}/_annotations.coco.json",
    "{}/annotations.json",
)
ROBOFLOW = "_annotations.coco.json"
LOOKED_AT = 20  # images of a split, to find their folder


def read(folder: Path, needed: Sequence[str]) -> Layout | None:
    """Read the folder if it has this layout with one of the needed splits, else return None.

    Raises:
        ValueError, FileNotFoundError: the layout matches, but files are missing.
    """
    files = {part: file for part in FOLDERS if (file := _annotations(folder, part))}
    if not any(part in files for part in needed):
        return None
    roboflow = any(file.name == ROBOFLOW for file in files.values())
    parts = {part: _part(folder, part, files[part]) for part in ("train", "val") if part in files}
    layout = Layout("COCO, as Roboflow exports it" if roboflow else "COCO", parts)
    if roboflow:
        _remove_dummy(layout)
    if "test" in files:
        layout.notes.append(f"{files['test']} is a test split: not used")
    return layout


def _annotations(folder: Path, part: str) -> Path | None:
    for place in PLACES:
        found = sorted({path for name in FOLDERS[part] for path in folder.glob(place.format(name))})
        if len(found) > 1:
            raise ValueError(
                f"{folder} has several annotation files for {part}: {', '.join(path.name for path in found)}. "
                "Choose one with --train-json FILE --train-images FOLDER --val-json FILE --val-images FOLDER"
            )
        if found:
            return found[0]
    return None


def _part(folder: Path, part: str, file: Path) -> Part:
    content = read_coco(file)
    if not content["images"]:
        raise ValueError(f"{file} has no images")
    return Part(content, _image_folder(folder, part, file, content["images"]), file)


def _image_folder(folder: Path, part: str, file: Path, images: list[dict]) -> Path:
    """The folder with most of the first images."""
    names = [file.stem.removeprefix("instances_"), *FOLDERS[part]]
    places = [place for name in names for place in (folder / name, folder / "images" / name, folder / name / "images")]
    places += [file.parent, folder / "images", folder]
    places = list(dict.fromkeys(place for place in places if place.is_dir()))
    first = [str(image.get("file_name")) for image in images[:LOOKED_AT]]
    hits = [sum((place / name).is_file() for name in first) for place in places]
    if not any(hits):
        raise FileNotFoundError(
            f"{file}: images such as {first[0]} not found in any of {', '.join(str(place) for place in places)}"
        )
    return places[hits.index(max(hits))]


def _remove_dummy(layout: Layout) -> None:
    """Remove Roboflow's first category, the project name, which no object has."""
    used = {entry.get("category_id") for part in layout.parts.values() for entry in part.content["annotations"]}
    for name, part in layout.parts.items():
        categories = part.content["categories"]
        kept = [category for category in categories if category["id"] != 0 or 0 in used]
        if kept and len(kept) < len(categories):
            layout.parts[name] = Part(part.content | {"categories": kept}, part.images)
            dummy = next(category["name"] for category in categories if category["id"] == 0)
            note = f'category 0, "{dummy}", was added by Roboflow and has no objects: removed'
            if note not in layout.notes:
                layout.notes.append(note)
