"""Letters of as many scripts as possible, in pictures and plots."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont

OWN_FONT = "DejaVu Sans"  # comes with matplotlib; Latin, Greek, Cyrillic and more
# For letters that it lacks; those that are installed are used.
MORE_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari")


def font_names() -> list[str]:
    """Names of the fonts that matplotlib finds, best first."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return [OWN_FONT, *(name for name in MORE_FONTS if name in installed)]


def load_font(size: int, texts: Iterable[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font for Pillow that has most letters of the texts. Without matplotlib Pillow's own, which has only ASCII."""
    from PIL import ImageFont

    try:
        from matplotlib import font_manager
    except ImportError:
        return ImageFont.load_default(size)
    letters = set(map(ord, "".join(texts)))
    files = [font_manager.findfont(name) for name in font_names()]
    best = min(files, key=lambda file: len(letters - font_manager.get_font(file).get_charmap().keys()))
    return ImageFont.truetype(best, size)


@contextmanager
def plain_text() -> Iterator[None]:
    """For matplotlib: names may contain "$", and letters for which there is no font here."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "font.family": font_names()}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield
