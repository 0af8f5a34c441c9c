"""Turn pictures as their EXIF data say. Needs only Pillow."""

from __future__ import annotations

from PIL import Image

ORIENTATION = 0x0112  # EXIF tag
METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)  # exchange width and height


def as_seen(image: Image.Image) -> Image.Image:
    """Turned upright. Damaged EXIF data are ignored, which `PIL.ImageOps.exif_transpose` does not do."""
    image.load()  # Pillow turns TIFF files here, and removes their tag
    method = METHODS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def size_as_seen(image: Image.Image) -> tuple[int, int]:
    """Width and height of `as_seen`. Reads only the header; of a PNG file without EXIF data, and of TIFF files that are
    turned, all."""
    turned = _orientation(image) in QUARTER_TURNS
    if turned and image.format == "TIFF":
        return as_seen(image).size
    return image.size[::-1] if turned else image.size


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # of all kinds, for damaged data
        image.load()  # raises if it is the picture that is damaged
        return None
