"""The 15 usual corruptions of images, in 5 strengths.

They are those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) in the form of COCO-C, for images of any size
(Michaelis et al., arXiv 1907.07484), whose program is the PyPI package imagecorruptions. That package, last released in
2021, is not used: it needs OpenCV, and NumPy 2 and scikit-image 0.26 lack functions that it calls (`np.float_`, the
argument `multichannel`), as newer setuptools lack `pkg_resources`, so it would run only with shims. Here they are
written with NumPy, SciPy and Pillow; the constants in `CORRUPTIONS` are the published ones. What differs:

- Frost lays ice over the image. Their ice is one of five photographs without a known licence; ours is drawn, with the
  colour and contrast of those photographs.
- Images may have any size; theirs need 32 pixels. Motion blur never leaves the image, so small images do not darken.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage, signal

STRENGTHS = (1, 2, 3, 4, 5)
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue (ITU-R BT.601)
SWING = 100.0  # of the coarsest step of a cloud
# Mean of red, green and blue, and standard deviation, of the photographs of frost in imagecorruptions 1.1.2.
ICE = (((78, 149, 166), 19), ((201, 205, 214), 22), ((201, 205, 214), 22), ((138, 153, 165), 29), ((112, 123, 135), 43))


class Corruption(NamedTuple):
    """A corruption.

    apply: from an image, (H, W, 3) float32 in [0, 255], random numbers, and constants to an image of the same shape,
        whose values may leave that range.
    constants: of each strength.
    """

    apply: Callable[..., np.ndarray]
    constants: tuple[tuple[Any, ...], ...]


def corrupt(image: np.ndarray, name: str, strength: int, seed: int) -> np.ndarray:
    """Corrupt an image.

    Args:
        image: (H, W, 3) uint8 in RGB, of any size; not modified.
        name: a key of `CORRUPTIONS`.
        strength: 1 to 5.
        seed: of the image, at least 0. The same seed gives the same result, and at other strengths the same pattern.

    Returns:
        (H, W, 3) uint8 in RGB.

    Raises:
        ValueError: unknown name or strength, or another array.
    """
    check_corruption(name)
    if strength not in STRENGTHS:
        raise ValueError(f"strength {strength} of {name}: it must be one of {', '.join(map(str, STRENGTHS))}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image of shape {image.shape} and {image.dtype}: it must be (H, W, 3) uint8 and not empty")
    corruption = CORRUPTIONS[name]
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name)])
    corrupted = corruption.apply(image.astype(np.float32), rng, *corruption.constants[strength - 1])
    return np.clip(corrupted, 0, 255).astype(np.uint8)  # rounds down, as the published programs do


def check_corruption(name: str) -> None:
    """
    Raises:
        ValueError: there is no such corruption.
    """
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(CORRUPTIONS)}"
        raise ValueError(f"there is no corruption {name}; {hint}")


def _gaussian_noise(image: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    return image + 255 * deviation * rng.standard_normal(image.shape, np.float32)


def _shot_noise(image: np.ndarray, rng: np.random.Generator, photons: int) -> np.ndarray:
    return rng.poisson(image * (photons / 255)) * (255 / photons)


def _impulse_noise(image: np.ndarray, rng: np.random.Generator, fraction: float) -> np.ndarray:
    draw = rng.random(image.shape, np.float32)
    return np.where(draw < fraction, np.where(draw < fraction / 2, 0, 255), image)


def _defocus_blur(image: np.ndarray, rng: np.random.Generator, radius: int, blur: float) -> np.ndarray:
    reach = max(radius, 8)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    taps = 1 if radius <= 8 else 2  # of the Gaussian that smooths the edge, on either side
    # As published: mirrored at its border, the largest disk gains 1 % of its sum.
    disk = ndimage.gaussian_filter(disk / disk.sum(), blur, mode="mirror", radius=taps)
    padded = np.pad(image, [(reach, reach), (reach, reach), (0, 0)], mode="reflect")
    return signal.fftconvolve(padded, disk[..., None], mode="valid", axes=(0, 1))


def _glass_blur(image: np.ndarray, rng: np.random.Generator, sigma: float, distance: int, repeats: int) -> np.ndarray:
    image = np.floor(_gaussian(image, sigma))
    for _ in range(repeats):
        image = image.reshape(-1, 3)[_scattered(*image.shape[:2], distance, rng)].reshape(image.shape)
    return _gaussian(image, sigma)


def _motion_blur(image: np.ndarray, rng: np.random.Generator, radius: int, sigma: float) -> np.ndarray:
    return _blur_along(image, rng.uniform(-45, 45), radius, sigma)


def _zoom_blur(image: np.ndarray, rng: np.random.Generator, end: float, step: float) -> np.ndarray:
    factors = np.arange(1, end, step)
    return (image + sum(_zoom(image, factor) for factor in factors)) / (len(factors) + 1)


def _snow(
    image: np.ndarray,
    rng: np.random.Generator,
    mean: float,
    deviation: float,
    size: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> np.ndarray:
    flakes = _zoom(rng.normal(mean, deviation, image.shape[:2]), size)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _blur_along(flakes, rng.uniform(-135, -45), radius, sigma)[..., None]
    white = np.maximum(image, (image @ GREY)[..., None] * 1.5 + 127.5)
    return kept * image + (1 - kept) * white + 255 * (flakes + flakes[::-1, ::-1])


def _frost(image: np.ndarray, rng: np.random.Generator, kept: float, added: float) -> np.ndarray:
    colour, contrast = ICE[rng.integers(len(ICE))]
    ice = colour + contrast * _crystals(*image.shape[:2], rng)[..., None]
    return kept * image + added * ice.clip(0, 255)


def _fog(image: np.ndarray, rng: np.random.Generator, density: float, decay: float) -> np.ndarray:
    highest, added = image.max(), 255 * density
    return (image + added * _cloud(*image.shape[:2], decay, rng)[..., None]) * (highest / (highest + added))


def _brightness(image: np.ndarray, rng: np.random.Generator, added: float) -> np.ndarray:
    value = image.max(axis=2, keepdims=True)  # of HSV, whose hue and saturation stay
    brighter = np.minimum(value + 255 * added, 255)
    return np.where(value > 0, image * (brighter / np.maximum(value, 1)), brighter)


def _contrast(image: np.ndarray, rng: np.random.Generator, kept: float) -> np.ndarray:
    mean = image.mean(axis=(0, 1))
    return mean + kept * (image - mean)


def _elastic_transform(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    shape = image.shape[:2]
    furthest, sigma = 0.005 * shape[0], [0.01 * side for side in shape]
    shifts = rng.uniform(-furthest, furthest, (2, *shape))
    shifts = np.stack([ndimage.gaussian_filter(shift, sigma, truncate=3, mode="reflect") for shift in shifts])
    places = np.indices(shape) + 250 * strength * shifts
    channels = np.moveaxis(image, 2, 0)
    return np.stack([ndimage.map_coordinates(c, places, order=1, mode="reflect") for c in channels], axis=2)


def _pixelate(image: np.ndarray, rng: np.random.Generator, factor: float) -> np.ndarray:
    picture = Image.fromarray(image.astype(np.uint8))
    few = picture.resize([max(int(side * factor), 1) for side in picture.size], Image.Resampling.BOX)
    return np.asarray(few.resize(picture.size, Image.Resampling.NEAREST))


def _jpeg_compression(image: np.ndarray, rng: np.random.Generator, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def _zoom(image: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the middle of an image, linearly interpolated; (H, W) or (H, W, C), and so is the result."""
    for axis in (0, 1):
        size = image.shape[axis]
        kept = math.ceil(size / factor)
        place = (size - kept) // 2 + np.arange(size) * ((kept - 1) / max(round(kept * factor) - 1, 1))
        low = place.astype(np.int64)
        weight = (place - low).astype(np.float32).reshape([-1 if other == axis else 1 for other in range(image.ndim)])
        high = np.minimum(low + 1, size - 1)
        image = image.take(low, axis) * (1 - weight) + image.take(high, axis) * weight
    return image


def _blur_along(image: np.ndarray, angle: float, radius: int, sigma: float) -> np.ndarray:
    """Smear an image, (H, W) or (H, W, C), along one direction, in degrees, with half of a Gaussian."""
    length = 2 * radius + 1
    weights = np.exp(-(np.arange(length) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    height, width = image.shape[:2]
    padded = np.pad(image, [(length, length)] * 2 + [(0, 0)] * (image.ndim - 2), mode="edge")
    blurred = np.zeros_like(image)
    for number, weight in enumerate(weights.tolist()):
        top = length + math.ceil(number * math.sin(math.radians(angle)) - 0.5)
        left = length + math.ceil(number * math.cos(math.radians(angle)) - 0.5)
        blurred += weight * padded[top : top + height, left : left + width]
    return blurred


def _scattered(height: int, width: int, distance: int, rng: np.random.Generator) -> np.ndarray:
    """From which pixel each of the (height * width) pixels is taken, nearby.

    The published program visits pixels from the last to the first. It means to exchange each with a random neighbour,
    but its arrays are views, so that the pixel becomes a copy of its neighbour, and the neighbour stays. A neighbour
    visited before is a copy already: chains of copies are followed to their ends, twice as far each time.
    """
    inside = np.s_[distance + 1 : height - distance + 1, distance + 1 : width - distance + 1]
    here = np.arange(height * width).reshape(height, width)[inside].ravel()
    down, right = rng.integers(-distance, distance, (2, len(here)))
    source, copied = np.arange(height * width), np.zeros(height * width, bool)
    source[here] += down * width + right
    copied[here] = source[here] > here
    while copied.any():
        pixels = np.flatnonzero(copied)
        neighbours = source[pixels]
        source[pixels], copied[pixels] = source[neighbours], copied[neighbours]
    return source


def _cloud(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A fractal (height, width) in [0, 1], by the diamond-square method: midpoints are means of their neighbours and
    random numbers, less of them with each halving of the step."""
    step = size = 2 ** math.ceil(math.log2(max(height, width, 2)))
    cloud, swing = np.zeros((size, size), np.float32), SWING

    def randomly(total: np.ndarray) -> np.ndarray:
        return total / 4 + swing * rng.uniform(-swing, swing, total.shape)

    while step > 1:
        half = step // 2
        corners = cloud[::step, ::step]  # of squares, which go on at the opposite border
        below, right = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
        centres = randomly(corners + below + right + np.roll(below, -1, 1))
        cloud[half::step, half::step] = centres
        cloud[::step, half::step] = randomly(corners + right + centres + np.roll(centres, 1, 0))
        cloud[half::step, ::step] = randomly(corners + below + centres + np.roll(centres, 1, 1))
        step, swing = half, swing / decay
    cloud -= cloud.min()
    return cloud[:height, :width] / cloud.max()


def _crystals(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Ice (height, width) of mean 0 and standard deviation 1: needles in three directions on a cloud. As in the
    photographs, pixels two apart differ by three quarters of what distant ones do."""
    ice, margin = 6 * _cloud(height, width, 2, rng), 16  # pixels: as far as needles reach
    for angle in rng.uniform(0, 180) + np.array([0, 60, 120]):
        seeds = rng.random((height + 2 * margin, width + 2 * margin), np.float32) < 0.02
        needles = _blur_along(10 * seeds.astype(np.float32), angle, margin // 2, 8)
        ice += needles[margin : margin + height, margin : margin + width]
    return (ice - ice.mean()) / max(ice.std(), 1e-6)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": Corruption(_shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": Corruption(_impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": Corruption(_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": Corruption(_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": Corruption(_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": Corruption(_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": Corruption(
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(_frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": Corruption(_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": Corruption(_brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": Corruption(_contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": Corruption(_elastic_transform, ((0.05,), (0.065,), (0.085,), (0.1,), (0.12,))),
    "pixelate": Corruption(_pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": Corruption(_jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
