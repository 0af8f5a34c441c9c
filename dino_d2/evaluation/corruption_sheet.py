"""Draw an image under every corruption, to see what a strength means."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from dino_d2.fonts import load_font

from .corruptions import CORRUPTIONS, corrupt

PANEL, GAP, CAPTION, COLUMNS = 320, 8, 22, 4  # pixels: longest side of an image, space around it, height of its name
PAPER, INK = (255, 255, 255), (0, 0, 0)


def draw_corruptions(image: np.ndarray, strength: int) -> Image.Image:
    """The image, and the same under each corruption.

    Args:
        image: (H, W, 3) uint8 in RGB.
        strength: 1 to 5.
    """
    pictures = {"clean": image} | {name: corrupt(image, name, strength, seed=0) for name in CORRUPTIONS}
    scale = PANEL / max(image.shape[:2])
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    rows = -(-len(pictures) // COLUMNS)
    cell = (max(width, PANEL // 2) + GAP, height + CAPTION + GAP)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + GAP, rows * cell[1] + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), load_font(15, pictures)
    for number, (name, pixels) in enumerate(pictures.items()):
        left, top = GAP + number % COLUMNS * cell[0], GAP + number // COLUMNS * cell[1]
        pen.text((left, top), name.replace("_", " "), fill=INK, font=font)
        panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(panel, (left, top + CAPTION))
    return sheet
