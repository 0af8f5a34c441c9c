"""Read images as detectron2 does, with 16-bit support and clear errors."""

from __future__ import annotations

import io
import urllib.request
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from dino_d2.detections import DEEP_MODES, with_8_bits
from dino_d2.orientation import as_seen, size_as_seen

TIMEOUT = 30  # seconds, for a URL
LARGEST_DOWNLOAD = 256 << 20  # bytes
SUFFIXES = {".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def images_in(folder: Path, recursive: bool = False) -> list[Path]:
    """Sorted paths of the files with an image suffix."""
    found = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())


class UnreadableImage(ValueError):
    """A file that is not an image, or is damaged."""


def read_image(path: str | PathLike, image_format: str) -> np.ndarray:
    """Read an image: converts grey, palette, alpha and CMYK, and rotates according to EXIF data.

    16-bit pixels keep their upper 8 bits, as PIL does for colour images. Transparency is ignored.

    Args:
        path: a file in any format that PIL reads.
        image_format: "BGR", "RGB" or, for grey, "L".

    Returns:
        (H, W, 3) uint8; (H, W, 1) for "L".

    Raises:
        UnreadableImage: the file is not an image, or is damaged.
        ValueError: the range of its pixel values is unknown.
        FileNotFoundError: the file does not exist.
    """
    return read_reduced(path, image_format, None)[0]


def read_reduced(
    path: str | PathLike, image_format: str, shorter_side: int | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """`read_image`, but a JPEG file is decoded at a half, a quarter or an eighth of its size if that is enough.

    A photograph of 12 megapixels takes a third of the time then, and what is done with it afterwards far less.

    Args:
        shorter_side: that is enough, in pixels; None: the whole size.

    Returns:
        the pixels as `read_image` gives them, and the height and width of the whole image.

    Raises:
        see `read_image`.
    """
    path = str(path)
    try:
        with _open(path) as file:
            image = Image.open(file)
            whole = size_as_seen(image)[::-1]
            if shorter_side is not None:
                image.draft(None, (shorter_side, shorter_side))
            image = as_seen(image)
            if not image.mode.startswith(DEEP_MODES):
                return detection_utils.convert_PIL_to_numpy(image, image_format), whole
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{path} cannot be read as an image: unknown format") from error
    except Exception as error:  # decoders raise all kinds
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error
    return detection_utils.convert_PIL_to_numpy(with_8_bits(image, path), image_format), whole


def _open(path: str) -> IO[bytes]:
    """A file, or the content of a URL; iopath would keep the first picture of a URL for good."""
    if not path.startswith(("http://", "https://")):
        return PathManager.open(path, "rb")
    with urllib.request.urlopen(path, timeout=TIMEOUT) as response:
        content = response.read(LARGEST_DOWNLOAD + 1)
    if len(content) > LARGEST_DOWNLOAD:
        raise ValueError(f"more than {LARGEST_DOWNLOAD >> 20} MiB")
    return io.BytesIO(content)
