"""The pictures of a report: small ones inside the page, links to the full ones, and a bound on their bytes."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2.utils import htmlsafe_json_dumps
from PIL import Image

from dino_d2.data import read_image
from dino_d2.orientation import as_seen

THUMBNAIL = 320  # pixels of the longer side
QUALITY = 70  # of JPEG
NAMED = 3  # missing pictures that are named

Entry = dict[str, Any]


def embed_pictures(numbers: Entry, images: Path, folder: Path, room: int) -> Entry:
    """Add a thumbnail and a link to every image of the report, as far as there is room.

    Args:
        numbers: a report or a comparison.
        images: the folder that the `file` of every image is relative to.
        folder: of the page.
        room: bytes that the images' entries may take in the page.

    Returns:
        the report with only the images that fit, renumbered wherever they are mentioned. Each has "link", a URL, and
        "thumbnail", a data URL or null if the picture cannot be read. "left_out" tells what is missing.
    """
    kept: dict[int, Entry] = {}
    unreadable = []
    for index in _most_telling_first(numbers):
        entry = numbers["images"][index]
        path = images / entry["file"]
        entry = entry | {"thumbnail": data_url(path, THUMBNAIL, THUMBNAIL), "link": _link(path, folder)}
        room -= len(htmlsafe_json_dumps(entry).encode()) + 1
        if room < 0:
            break
        kept[index] = entry
        if entry["thumbnail"] is None:
            unreadable.append(entry["file"])
    left_out = list(numbers["left_out"])
    if len(kept) < (count := len(numbers["images"])):
        left_out.append(f"{count - len(kept)} of the gallery's {count} images, to keep the page small.")
    if unreadable:
        names = ", ".join(unreadable[:NAMED]) + (" …" if len(unreadable) > NAMED else "")
        left_out.append(f"Pictures that could not be read in {images}: {len(unreadable)} of {len(kept)} ({names}).")
    return _only(numbers, kept) | {"left_out": left_out}


def data_url(path: Path, width: int, height: float = math.inf) -> str | None:
    """A picture as JPEG, at most so many pixels large; None if the file is missing, or is no picture."""
    try:
        picture = _read(path, 2 * width)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    scale = min(width / picture.width, height / picture.height, 1)
    picture = picture.resize([max(round(side * scale), 1) for side in picture.size], Image.Resampling.BILINEAR, None, 2)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _read(path: Path, enough: int) -> Image.Image:
    """As the detector sees it. JPEGs larger than `enough` pixels on both sides are decoded at a fraction of their size,
    which is many times faster."""
    with Image.open(path) as file:
        if file.format == "JPEG" and file.mode == "RGB":
            file.draft("RGB", (enough, enough))
            return as_seen(file)
    return Image.fromarray(read_image(path, "RGB"))


def _link(path: Path, folder: Path) -> str:
    """A URL relative to the page, so that both can move together; absolute if they are on different drives."""
    path, folder = path.resolve(), folder.resolve()
    try:
        return quote(Path(os.path.relpath(path, folder)).as_posix())
    except ValueError:
        return path.as_uri()


def _most_telling_first(numbers: Entry) -> Iterator[int]:
    """Every image once: the first of each list, then the second of each, …, then the others."""
    turns = zip_longest(*map(list, _mentions(numbers)))
    mentioned = (index for turn in turns for index in turn if index is not None)
    yield from dict.fromkeys([*mentioned, *range(len(numbers["images"]))])


def _mentions(numbers: Entry) -> Iterator[Iterable[int]]:
    """Lists of image indices, one for each list that mentions images."""
    for cases in numbers.get("cases", {}).values():
        yield map(_image_of, cases)
    for name in ("label_errors", "better", "worse"):
        yield map(_image_of, numbers.get(name, []))


def _image_of(mention: int | list[int] | Entry) -> int:
    """Of a worst image, a case or a label error."""
    if isinstance(mention, int):
        return mention
    return mention["image"] if isinstance(mention, dict) else mention[0]


def _only(numbers: Entry, kept: dict[int, Entry]) -> Entry:
    """The report with only these images (index -> entry), in their order."""
    places = {index: place for place, index in enumerate(sorted(kept))}

    def renumber(mentions: list) -> list:
        return [_with_image(x, places[_image_of(x)]) for x in mentions if _image_of(x) in places]

    changed: Entry = {"images": [kept[index] for index in places]}
    if "cases" in numbers:
        changed["cases"] = {kind: renumber(cases) for kind, cases in numbers["cases"].items()}
    changed |= {name: renumber(numbers[name]) for name in ("label_errors", "better", "worse") if name in numbers}
    return numbers | changed


def _with_image(mention: int | list[int] | Entry, index: int) -> int | list[int] | Entry:
    if isinstance(mention, int):
        return index
    return mention | {"image": index} if isinstance(mention, dict) else [index, *mention[1:]]
