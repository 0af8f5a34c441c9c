"""Images of every kind that people have."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile

from dino_d2.data import UnreadableImage, images, read_image, read_reduced
from tests.web import serve

GREY = np.linspace(0, 255, 6 * 8).astype(np.uint8).reshape(6, 8)


def saved(pixels: np.ndarray | Image.Image, path: Path, **options: object) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_every_mode_becomes_three_channels_of_8_bits(mode: str, tmp_path: Path) -> None:
    image = read_image(saved(Image.fromarray(GREY).convert(mode), tmp_path / "picture.png"), "BGR")
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.dstack([GREY] * 3))


def test_print_colours_are_converted(tmp_path: Path) -> None:
    red = Image.new("CMYK", (5, 4), (0, 255, 255, 0))
    image = read_image(saved(red, tmp_path / "print.tif"), "RGB")
    assert image.shape == (4, 5, 3)
    assert (image == [255, 0, 0]).all()


def test_channels_have_the_order_that_is_asked_for(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (2, 2), (1, 2, 3)), tmp_path / "colour.png")
    assert read_image(path, "RGB")[0, 0].tolist() == [1, 2, 3]
    assert read_image(path, "BGR")[0, 0].tolist() == [3, 2, 1]


@pytest.mark.parametrize(("dtype", "ending"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_16_bits_are_scaled_not_clipped(dtype: type, ending: str, tmp_path: Path) -> None:
    deep = GREY.astype(dtype) * 257  # 255 -> 65535
    image = read_image(saved(deep, tmp_path / f"deep.{ending}"), "BGR")
    assert image.dtype == np.uint8
    assert np.array_equal(image, np.dstack([GREY] * 3))


@pytest.mark.parametrize(
    "pixels", [GREY.astype(np.float32) / 255, GREY.astype(np.int32) * 1000, GREY.astype(np.int32) - 1]
)
def test_pixels_of_unknown_range_are_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    path = saved(pixels, tmp_path / "measured.tif")
    with pytest.raises(ValueError, match=r"measured\.tif has pixel values of unknown range .* 8 or 16 bits"):
        read_image(path, "BGR")


def test_picture_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn clockwise
    path = saved(Image.fromarray(GREY), tmp_path / "upright.png", exif=exif)
    assert np.array_equal(read_image(path, "RGB")[:, :, 0], np.rot90(GREY, -1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "no image", "empty"])
def test_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.jpg"
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, kind if kind in ("PNG", "JPEG") else "PNG")
    path.write_bytes({"no image": b"hello", "empty": b""}.get(kind, whole.getvalue()[:700]))
    with pytest.raises(ValueError, match=r"damaged\.jpg cannot be read as an image: "):
        read_image(path, "RGB")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_cut_off_jpeg_is_named_and_not_filled_with_grey(share: float, options: dict, tmp_path: Path) -> None:
    path = saved(Image.effect_noise((200, 150), 50).convert("RGB"), tmp_path / "cut.jpg", **options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # no library that is imported here has set it
    with pytest.raises(UnreadableImage, match=r"cut\.jpg cannot be read as an image: .*truncated"):
        read_image(path, "BGR")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_file_is_opened_once(dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(GREY.astype(dtype), tmp_path / "a.png")
    opened = []

    def counting_open(name: str, *arguments: object) -> object:
        opened.append(name)
        return open(name, *arguments)

    monkeypatch.setattr(PathManager, "open", counting_open)
    read_image(path, "BGR")
    assert opened == [str(path)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_pixels_are_those_of_detectron2(orientation: int, mode: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(Image.fromarray(GREY).convert(mode), tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(path, "BGR"), detection_utils.read_image(str(path), "BGR"))


def test_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png", "RGB")


def test_url_is_read_each_time_and_from_its_own_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def png(brightness: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (2, 2), (brightness,) * 3).save(file, "PNG")
        return file.getvalue()

    with serve() as one, serve() as other:
        one.files["/camera.png"], other.files["/camera.png"] = png(10), png(20)
        assert read_image(f"{one.url}/camera.png", "RGB").max() == 10
        assert read_image(f"{other.url}/camera.png", "RGB").max() == 20
        one.files["/camera.png"] = png(30)
        assert read_image(f"{one.url}/camera.png", "RGB").max() == 30
        with pytest.raises(UnreadableImage, match=r"nothing\.png.*404"):
            read_image(f"{one.url}/nothing.png", "RGB")
        monkeypatch.setattr(images, "LARGEST_DOWNLOAD", 20)
        with pytest.raises(UnreadableImage, match="more than"):
            read_image(f"{one.url}/camera.png", "RGB")


@pytest.mark.parametrize(
    ("shorter_side", "expected"),
    [(None, (300, 400)), (151, (300, 400)), (150, (150, 200)), (75, (75, 100)), (40, (75, 100)), (1, (38, 50))],
)
def test_large_jpeg_is_decoded_smaller(shorter_side: int | None, expected: tuple[int, int], tmp_path: Path) -> None:
    gradient = Image.linear_gradient("L").resize((400, 300)).convert("RGB")
    path = saved(gradient, tmp_path / "photograph.jpg", quality=95)
    pixels, size = read_reduced(path, "RGB", shorter_side)
    assert (pixels.shape, size) == ((*expected, 3), (300, 400))
    wanted = np.asarray(gradient.resize(expected[::-1], Image.Resampling.BOX), np.float32)
    assert np.abs(pixels - wanted).mean() < 2


def test_size_of_a_turned_photograph_is_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = saved(Image.new("RGB", (400, 300)), tmp_path / "portrait.jpg", exif=exif)
    pixels, size = read_reduced(path, "RGB", 100)
    assert (pixels.shape, size) == ((200, 150, 3), (400, 300))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_file_is_turned_once(orientation: int, tmp_path: Path) -> None:
    path = saved(GREY, tmp_path / "a.tif", tiffinfo={0x0112: orientation})
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, size = read_reduced(path, "RGB", None)
    assert np.array_equal(pixels, read_image(saved(GREY, tmp_path / "a.png", exif=exif), "RGB"))
    assert size == pixels.shape[:2]


def test_damaged_exif_data_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(GREY, tmp_path / "a.png")

    def fail(image: Image.Image) -> None:
        raise TypeError("resolution is text")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert read_reduced(path, "RGB", None)[1] == GREY.shape


@pytest.mark.parametrize(("mode", "ending"), [("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg")])
def test_other_files_are_read_reduced_if_their_format_can_be(mode: str, ending: str, tmp_path: Path) -> None:
    path = saved(Image.new(mode, (400, 300)), tmp_path / f"picture.{ending}")
    pixels, size = read_reduced(path, "BGR", 100)
    assert pixels.shape == ((300, 400, 3) if ending == "png" else (150, 200, 3))
    assert size == (300, 400)


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_damaged_jpeg_is_found_when_it_is_read_small(share: float, tmp_path: Path) -> None:
    path = saved(Image.effect_noise((400, 300), 50), tmp_path / "photograph.jpg")
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])
    with pytest.raises(UnreadableImage, match=r"photograph\.jpg cannot be read"):
        read_reduced(path, "RGB", 1)
