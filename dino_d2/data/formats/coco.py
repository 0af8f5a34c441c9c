"""COCO's own layout, the plain one of most programs, and Roboflow's."""

from __future__ import annotations

from pathlib import Path

from dino_d2.data.datasets import read_coco

from .parts import FOLDERS, Layout, Part

# Where the annotations of a part may be, {}: its name; the first that is there.
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
LOOKED_AT = 20  # images of a part, to find their folder


def read(folder: Path) -> Layout | None:
    """None: it is another layout.

    Raises:
        ValueError, FileNotFoundError: it is this one, but its files are not complete.
    """
    files = {part: file for part in FOLDERS if (file := _annotations(folder, part))}
    if "train" not in files:
        return None
    roboflow = files["train"].name == ROBOFLOW
    parts = {part: _part(folder, part, files[part]) for part in ("train", "val") if part in files}
    layout = Layout("COCO, as Roboflow exports it" if roboflow else "COCO", parts)
    if roboflow:
        _leave_out_dummy(layout)
    if "test" in files:
        layout.notes.append(f"{files['test']} is a test part: it is left alone")
    return layout


def _annotations(folder: Path, part: str) -> Path | None:
    for place in PLACES:
        found = sorted({path for name in FOLDERS[part] for path in folder.glob(place.format(name))})
        if len(found) > 1:
            raise ValueError(
                f"{folder} has several annotation files of the part {part}: {', '.join(path.name for path in found)}. "
                "Say which: --train-json FILE --train-images FOLDER --val-json FILE --val-images FOLDER"
            )
        if found:
            return found[0]
    return None


def _part(folder: Path, part: str, file: Path) -> Part:
    content = read_coco(file)
    if not content["images"]:
        raise ValueError(f"{file} lists no images")
    return Part(content, _image_folder(folder, part, file, content["images"]), file)


def _image_folder(folder: Path, part: str, file: Path, images: list[dict]) -> Path:
    """Where most of the first images are."""
    names = [file.stem.removeprefix("instances_"), *FOLDERS[part]]
    places = [place for name in names for place in (folder / name, folder / "images" / name, folder / name / "images")]
    places += [file.parent, folder / "images", folder]
    places = list(dict.fromkeys(place for place in places if place.is_dir()))
    first = [str(image.get("file_name")) for image in images[:LOOKED_AT]]
    hits = [sum((place / name).is_file() for name in first) for place in places]
    if not any(hits):
        raise FileNotFoundError(
            f"{file}: its images, such as {first[0]}, are in none of {', '.join(str(place) for place in places)}"
        )
    return places[hits.index(max(hits))]


def _leave_out_dummy(layout: Layout) -> None:
    """Roboflow's first category is the name of the project, and no object has it."""
    used = {entry.get("category_id") for part in layout.parts.values() for entry in part.content["annotations"]}
    for name, part in layout.parts.items():
        categories = part.content["categories"]
        kept = [category for category in categories if category["id"] != 0 or 0 in used]
        if kept and len(kept) < len(categories):
            layout.parts[name] = Part(part.content | {"categories": kept}, part.images)
            dummy = next(category["name"] for category in categories if category["id"] == 0)
            note = f'the category 0, "{dummy}", is Roboflow\'s and has no objects: it is left out'
            if note not in layout.notes:
                layout.notes.append(note)
