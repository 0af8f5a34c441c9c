"""The data of the studies, as COCO JSON: tree crowns, raccoons and playing cards.

In the folder of a data set: `train.json` and `test.json` with images in `train/` and `test/`, and for choosing settings
`train_fit.json` and `train_held.json`, two parts of the training images. The photographs are not ours to distribute:
the trees come from PyPI (dev/demo_data.py), the others from public repositories or from a folder that holds them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defusedxml.ElementTree import parse
from PIL import Image

from dev.demo_data import cut, fetch, read_photo, test_tiles, training_tiles, write_backbone, write_coco
from dino_d2.data import read_coco
from dino_d2.data.formats.parts import Part, hold_out
from dino_d2.data.images import images_in

from .plan import Study

LONGEST, QUALITY = 640, 88  # of the pictures: pixels, JPEG
EVERY_FIFTH = 5  # raccoon is a test image
HELD_TREES = 4  # one part in so many of the photograph's width is held back
PARTS = ("train", "test")
MADE = "made_from.txt"  # written last
DOWNLOADS, BACKBONE = "downloads", "mobilenetv2.pth"

Entry = tuple[Path, Path]  # an image and its Pascal VOC file


@dataclass(frozen=True)
class Repository:
    """A public repository of images with Pascal VOC files.

    split: from its checkout to the entries of "train" and "test"."""

    url: str
    commit: str
    split: Callable[[Path], dict[str, list[Entry]]]


@dataclass(frozen=True)
class Scaled:
    """An image of at most `LONGEST` pixels, with the boxes (x, y, width, height) and names of its objects."""

    name: str
    image: Image.Image
    boxes: list[list[float]]
    labels: list[str]


def make(study: Study, source: Path | None, say: Callable[[str], None] = print) -> None:
    """Make the data sets of a study in their folders, unless they are there, and the weights of the backbone.

    Args:
        source: folder with ready `raccoon/` and `cards/`; None: clone the public repositories.

    Raises:
        FileNotFoundError, ValueError: the source lacks something; a data set is not known here.
    """
    downloads = study.work / "data" / DOWNLOADS
    for data in study.data:
        if (data.folder / MADE).is_file():
            say(f"{data.folder} is there; delete it to make it again")
            continue
        if data.name != "trees" and data.name not in REPOSITORIES:
            known = ", ".join(("trees", *REPOSITORIES))
            raise ValueError(f"{study.file}: {data.name} is not a data set that can be made ({known}): give its folder")
        shutil.rmtree(data.folder, ignore_errors=True)
        data.folder.mkdir(parents=True)
        if data.name == "trees":
            fetch(downloads)
            made_from = make_trees(downloads, data.folder)
        elif source is not None:
            made_from = copy_ready(source / data.name, data.folder)
        else:
            made_from = clone(REPOSITORIES[data.name], data.folder)
        (data.folder / MADE).write_text(made_from)
        counts = {file.stem: len(read_coco(file)["images"]) for file in sorted(data.folder.glob("*.json"))}
        say(f"{data.folder}: {', '.join(f'{name} {count} images' for name, count in counts.items())}")
    weights = study.work / "data" / BACKBONE
    if not weights.is_file():
        fetch(downloads)
        write_backbone(downloads, weights)
        say(str(weights))


def make_trees(downloads: Path, folder: Path) -> str:
    """Tiles as in the demo. Held back is the right quarter of the training photograph, which no other tile shows."""
    photo = read_photo(downloads, "train")
    height, width = photo.pixels.shape[:2]
    border = width - width // HELD_TREES
    tiles = {
        "train": training_tiles(photo),
        "train_fit": training_tiles(cut(photo, 0, 0, border, height)),
        "train_held": test_tiles(cut(photo, border, 0, width - border, height)),
        "test": test_tiles(read_photo(downloads, "test")),
    }
    for part, of_part in tiles.items():
        write_coco(of_part, folder / f"{part}.json", folder / part)
    return "dev/demo_data.py"


def copy_ready(source: Path, folder: Path) -> str:
    """Copy a data set that is in the form described above, and hold back a part of its training images."""
    for part in PARTS:
        if not (source / f"{part}.json").is_file() or not (source / part).is_dir():
            raise FileNotFoundError(f"{source} must hold {part}.json and the images in {part}/")
        shutil.copyfile(source / f"{part}.json", folder / f"{part}.json")
        shutil.copytree(source / part, folder / part)
    hold_back(folder)
    return "a folder"


def clone(repository: Repository, folder: Path) -> str:
    """Clone a repository and convert what it holds."""
    with tempfile.TemporaryDirectory() as checkout:
        # Without old versions of the images; the commit, which is not the last one, is fetched with it.
        subprocess.run(
            ["git", "clone", "--quiet", "--filter=blob:none", "--no-checkout", repository.url, checkout], check=True
        )
        subprocess.run(["git", "-C", checkout, "checkout", "--quiet", repository.commit], check=True)
        convert(repository.split(Path(checkout)), folder)
    return f"{repository.url} {repository.commit}"


def convert(split: dict[str, list[Entry]], folder: Path) -> None:
    """Write the parts, scaled, as JPEG and COCO JSON, and hold back a part of the training images.

    Categories are in alphabetical order.
    """
    parts = {part: [read_scaled(*entry) for entry in entries] for part, entries in split.items()}
    names = sorted({label for images in parts.values() for image in images for label in image.labels})
    for part, images in parts.items():
        (folder / part).mkdir()
        for image in images:
            image.image.save(folder / part / image.name, quality=QUALITY)
        (folder / f"{part}.json").write_text(json.dumps(as_coco(images, names)))
    hold_back(folder)


def read_scaled(image_file: Path, xml_file: Path) -> Scaled:
    """Scale an image and its boxes, and clip them; boxes without area are left out."""
    image = Image.open(image_file).convert("RGB")
    (width, height), scale = image.size, min(LONGEST / max(image.size), 1)
    size = round(width * scale), round(height * scale)
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes, labels = [], []
    for entry in parse(xml_file).getroot().iter("object"):
        x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}")) for side in sides)
        left, right = (min(max(x * size[0] / width, 0), size[0]) for x in (x1, x2))
        top, bottom = (min(max(y * size[1] / height, 0), size[1]) for y in (y1, y2))
        if right > left and bottom > top:
            boxes.append([left, top, right - left, bottom - top])
            labels.append(entry.findtext("name").strip())
    if scale < 1:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return Scaled(f"{image_file.stem}.jpg", image, boxes, labels)


def as_coco(images: Sequence[Scaled], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Ids start at 1; boxes and areas are rounded to hundredths of a pixel."""
    entries, annotations = [], []
    for number, image in enumerate(images, start=1):
        width, height = image.image.size
        entries.append({"id": number, "file_name": image.name, "width": width, "height": height})
        for box, label in zip(image.boxes, image.labels, strict=True):
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(label) + 1, "iscrowd": 0}
            annotations.append(ids | {"bbox": [round(x, 2) for x in box], "area": round(box[2] * box[3], 2)})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"images": entries, "annotations": annotations, "categories": categories}


def hold_back(folder: Path) -> None:
    """Write `train_fit.json` and `train_held.json`: a fifth of the training images is held back, by file name, as
    `dino-d2 train --data` does it."""
    fit, held = hold_out(Part(read_coco(folder / "train.json"), folder / "train"))
    for name, part in (("train_fit", fit), ("train_held", held)):
        (folder / f"{name}.json").write_text(json.dumps(part.content))


def split_raccoons(checkout: Path) -> dict[str, list[Entry]]:
    """Every fifth image by name, from the first, is for the test."""
    entries = _entries(checkout / "images", checkout / "annotations")
    return {
        "train": [entry for place, entry in enumerate(entries) if place % EVERY_FIFTH],
        "test": entries[::EVERY_FIFTH],
    }


def split_cards(checkout: Path) -> dict[str, list[Entry]]:
    """The repository's own split, with a Pascal VOC file beside every image."""
    return {part: _entries(checkout / "images" / part, checkout / "images" / part) for part in PARTS}


def _entries(images: Path, annotations: Path) -> list[Entry]:
    """The images with annotations, in order of their names."""
    entries = [(image, annotations / f"{image.stem}.xml") for image in images_in(images)]
    found = sorted((entry for entry in entries if entry[1].is_file()), key=lambda entry: entry[0].name)
    if not found:
        raise FileNotFoundError(f"{images} has no images with Pascal VOC files in {annotations}")
    return found


REPOSITORIES = {
    "raccoon": Repository("https://github.com/datitran/raccoon_dataset", "9393884", split_raccoons),
    "cards": Repository(
        "https://github.com/EdjeElectronics/TensorFlow-Object-Detection-API-Tutorial-Train-Multiple-Objects-Windows-10",
        "c164582",
        split_cards,
    ),
}
