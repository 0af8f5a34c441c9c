"""Reading images as detectron2 does, and what it gets wrong or leaves unsaid."""

from __future__ import annotations

from os import PathLike

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

DEEP_MODES = ("I", "F")  # how PIL's names of pixels with more than 8 bits begin; converting those clips at 255


class UnreadableImage(ValueError):
    """A file that is no image, or a damaged one."""


def read_image(path: str | PathLike, image_format: str) -> np.ndarray:
    """An image as it should be seen: grey, palette, alpha and CMYK converted, turned as its EXIF data say.

    Of pixels with 16 bits the upper 8 are taken, as PIL does by itself with colours. Transparency is ignored.

    Args:
        path: of a file in any format that PIL reads.
        image_format: "BGR" or "RGB".

    Returns:
        (H, W, 3) uint8.

    Raises:
        UnreadableImage: the file is no image, or is damaged; it is named.
        ValueError: its pixels have no known range.
        FileNotFoundError: there is no such file.
    """
    path = str(path)
    try:
        with PathManager.open(path, "rb") as file:
            image = Image.open(file)
            mode = image.mode
            image = detection_utils._apply_exif_orientation(image)
            if not mode.startswith(DEEP_MODES):
                return detection_utils.convert_PIL_to_numpy(image, image_format)
            grey = np.asarray(image)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{path} cannot be read as an image: it is in no known format") from error
    except Exception as error:  # decoders raise all kinds
        raise UnreadableImage(f"{path} cannot be read as an image: {error}") from error
    if mode.startswith("F") or grey.min() < 0 or grey.max() >= 2**16:
        raise ValueError(
            f"{path} has pixels of unknown range (PIL's mode {mode}): save it with 8 or 16 bits per colour"
        )
    return detection_utils.convert_PIL_to_numpy(Image.fromarray((grey // 256).astype(np.uint8)), image_format)
