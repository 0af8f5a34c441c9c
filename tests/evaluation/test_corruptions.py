"""Corruptions of images: what the published ones have in common, and what each of them does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dino_d2.evaluation.corruptions import CORRUPTIONS, STRENGTHS, _cloud, _scattered, corrupt

NOT_MONOTONIC = {"glass_blur", "snow", "frost"}  # at the published constants


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(96, 128, 3): smooth colours with edges, like a photograph."""
    rng = np.random.default_rng(3)
    picture = ndimage.gaussian_filter(rng.normal(0, 1, (96, 128, 3)), (6, 6, 0))
    picture = 110 + 40 * picture / picture.std()
    for y, x in rng.integers(0, 80, (12, 2)):
        picture[y : y + 14, x : x + 22] = rng.uniform(20, 235, 3)
    return picture.clip(0, 255).astype(np.uint8)


def change(corrupted: np.ndarray, image: np.ndarray) -> float:
    return float(np.abs(corrupted.astype(float) - image).mean())


def test_there_are_the_fifteen_in_five_strengths() -> None:
    assert len(CORRUPTIONS) == 15
    assert all(len(corruption.constants) == len(STRENGTHS) == 5 for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_change_more_with_strength(name: str, photo: np.ndarray) -> None:
    before = photo.copy()
    changes = [change(corrupt(photo, name, strength, 7), photo) for strength in STRENGTHS]
    np.testing.assert_array_equal(photo, before)
    assert min(changes) > 1
    assert changes[4] > changes[0] or name == "frost"
    assert name in NOT_MONOTONIC or changes == sorted(changes)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides(name: str, photo: np.ndarray) -> None:
    once, again, other = (corrupt(photo, name, 3, seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(once, again)
    fixed = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
    assert np.array_equal(once, other) == (name in fixed)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3), (7, 300), (33, 17)])
def test_any_size_works(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for image in (rng.integers(0, 256, (*shape, 3), np.uint8), np.zeros((*shape, 3), np.uint8)):
        for strength in (1, 5):
            corrupted = corrupt(image, name, strength, 0)
            assert corrupted.shape == image.shape
            assert corrupted.dtype == np.uint8


def test_what_has_a_formula_follows_it() -> None:
    """Values of imagecorruptions 1.1.2."""
    image = np.array([[[200, 100, 50], [0, 0, 0], [255, 255, 255], [10, 20, 40]]], np.uint8)
    assert corrupt(image, "brightness", 2, 0)[0].tolist() == [
        [251, 125, 62],
        [51, 51, 51],
        [255, 255, 255],
        [22, 45, 91],
    ]
    assert corrupt(image, "contrast", 1, 0)[0].tolist() == [[149, 96, 71], [69, 56, 51], [171, 158, 153], [73, 64, 67]]


def test_noise_has_the_published_size() -> None:
    grey = np.full((300, 300, 3), 128, np.uint8)
    gaussian = corrupt(grey, "gaussian_noise", 1, 0).astype(float)
    assert gaussian.std() == pytest.approx(255 * 0.08, rel=0.02)
    shot = corrupt(grey, "shot_noise", 1, 0).astype(float)
    assert shot.mean() == pytest.approx(128, abs=0.6)
    assert shot.std() == pytest.approx(np.sqrt(128 / 255 * 60) / 60 * 255, rel=0.02)
    impulse = corrupt(grey, "impulse_noise", 5, 0)
    assert np.mean(impulse == 0) == pytest.approx(0.27 / 2, rel=0.05)
    assert np.mean(impulse == 255) == pytest.approx(0.27 / 2, rel=0.05)


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_blurs_leave_a_plain_image_as_it_is(name: str) -> None:
    plain = np.full((40, 60, 3), (200, 90, 30), np.uint8)
    assert np.abs(corrupt(plain, name, 5, 1).astype(int) - plain).max() <= 2


def test_a_point_is_blurred_to_a_disk() -> None:
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    y, x = np.mgrid[-20:21, -20:21]
    bright = corrupt(image, "defocus_blur", 1, 0)[..., 0] > 4
    np.testing.assert_array_equal(bright, x**2 + y**2 <= 9)


def test_glass_copies_neighbours_one_after_the_other() -> None:
    """As the loop over pixels of the published program, with the same random numbers."""
    height, width, distance = 23, 31, 3
    rng = np.random.default_rng(5)
    inside = height - 2 * distance, width - 2 * distance
    down, right = np.random.default_rng(5).integers(-distance, distance, (2, np.prod(inside))).reshape(2, *inside)
    expected = np.arange(height * width).reshape(height, width)
    for row in range(height - distance, distance, -1):
        for column in range(width - distance, distance, -1):
            place = row - distance - 1, column - distance - 1
            expected[row, column] = expected[row + down[place], column + right[place]]
    np.testing.assert_array_equal(_scattered(height, width, distance, rng), expected.ravel())


def test_clouds_are_rougher_the_less_they_decay() -> None:
    smooth, rough = (_cloud(60, 100, decay, np.random.default_rng(0)) for decay in (3.0, 1.4))
    assert smooth.shape == rough.shape == (60, 100)
    assert min(smooth.min(), rough.min()) >= 0
    assert max(smooth.max(), rough.max()) <= 1
    assert np.abs(np.diff(rough)).mean() > 3 * np.abs(np.diff(smooth)).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (np.zeros((4, 4, 3), np.uint8), "gausian_noise", 1, 0),
            "no corruption gausian_noise; did you mean gaussian_n",
        ),
        ((np.zeros((4, 4, 3), np.uint8), "hail", 1, 0), "no corruption hail; they are gaussian_noise, "),
        ((np.zeros((4, 4, 3), np.uint8), "fog", 6, 0), "strength 6 of fog: it must be one of 1, 2"),
        ((np.zeros((4, 4), np.uint8), "fog", 1, 0), r"shape \(4, 4\) and uint8"),
        ((np.zeros((4, 4, 3)), "fog", 1, 0), "and float64"),
        ((np.zeros((0, 4, 3), np.uint8), "fog", 1, 0), "not empty"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrupt(*arguments)
