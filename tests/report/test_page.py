"""What write_page writes: the numbers, the plots, and one file that keeps to its bounds."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_d2.detections import as_picture
from dino_d2.report import page
from dino_d2.report.page import write_comparison_page, write_page
from dino_d2.report.pictures import data_url
from dino_d2.report.plots import MOST_CLASSES, confusion_shares, most_confused
from tests.report.made_report import (
    NASTY,
    made_comparison,
    made_curves,
    made_report,
    made_robustness,
    taken_for_each_other,
    write_pictures,
)


def read_data(index: Path) -> dict[str, Any]:
    """What the page's scripts read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', index.read_text("utf-8"))
    assert found
    return json.loads(found[1])


def plots(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "plots").glob("*.png")}


def test_numbers_and_plots_lie_beside_the_page(tmp_path: Path) -> None:
    numbers = made_report()
    images = write_pictures(numbers, tmp_path / "images")
    index = write_page(numbers, images, tmp_path / "report", made_curves(), made_robustness())
    assert index == tmp_path / "report" / "index.html"
    written = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert written["robustness"] == made_robustness()
    assert {key: written[key] for key in numbers} == numbers
    assert plots(tmp_path / "report") == {
        *("ap_by_class", "precision_recall", "f1", "errors", "confusion", "calibration", "layers", "slices"),
        *("curves", "corruptions", "sizes"),
    }


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    numbers = made_report(images=1)
    write_page(numbers, tmp_path, tmp_path / "report", made_curves(), made_robustness())
    write_page(numbers | {"queries": None}, tmp_path, tmp_path / "report")
    assert not plots(tmp_path / "report") & {"layers", "curves", "corruptions", "sizes"}


def test_plots_of_an_earlier_report_of_another_kind_do_not_stay(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "mine.png").touch()
    write_page(made_report(images=1), tmp_path, folder, made_curves(), made_robustness())
    write_comparison_page(made_comparison(), tmp_path, folder)
    assert plots(folder) == {"differences", "differences_by_class", "mine"}
    write_page(made_report(images=1), tmp_path, folder)
    assert not plots(folder) & {"differences", "differences_by_class"}


def test_report_that_measured_little_is_made_too(tmp_path: Path) -> None:
    numbers = made_report(images=0, classes=1)
    numbers |= {"queries": None, "f1": None, "confusion": {"cells": []}, "slices": {}, "label_errors": []}
    numbers["cases"] = {kind: [] for kind in numbers["cases"]}
    numbers["calibration"] = {"bins": [], "error": None}
    numbers["tide"] = dict.fromkeys(numbers["tide"])
    numbers["metrics"] = {"AP": {"value": None, "low": None, "high": None}}
    write_page(numbers, tmp_path, tmp_path / "report")
    assert plots(tmp_path / "report") == {"errors", "confusion", "calibration"}


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    numbers = made_report()
    images = write_pictures(numbers, tmp_path / "images")
    index = write_page(numbers, images, tmp_path / "report", made_curves())
    html = index.read_text("utf-8")
    assert "alert(1)" in html
    for raw in ("<b>cat", "<script>alert", "<shrubs>", "first <run>", "<a> &"):
        assert raw not in html
    data = read_data(index)
    assert [x["name"] for x in data["classes"]] == NASTY
    assert set(data["curves"]) == {"first <run>", "second"}


def test_full_pictures_are_linked_relatively_and_small_ones_embedded(tmp_path: Path) -> None:
    numbers = made_report(images=2)
    numbers["images"][1] |= {"width": 800, "height": 600}
    images = write_pictures(numbers, tmp_path / "images")
    data = read_data(write_page(numbers, images, tmp_path / "deep" / "report"))
    assert data["images"][0]["link"].startswith("../../images/folder/1%20%3Ca%3E")
    sizes = []
    for entry in data["images"]:
        kind, content = entry["thumbnail"].split(",")
        assert kind == "data:image/jpeg;base64"
        sizes.append(Image.open(io.BytesIO(base64.b64decode(content))).size)
    assert sizes == [(160, 120), (320, 240)]


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photograph_is_turned_as_the_camera_says(orientation: int, tmp_path: Path) -> None:
    numbers = made_report(images=1)
    numbers["images"][0]["file"] = "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.new("RGB", (2000, 1000), "blue")
    photo.paste("red", (0, 0, 1000, 1000))
    photo.save(tmp_path / "photo.jpg", exif=exif)
    data = read_data(write_page(numbers, tmp_path, tmp_path / "report"))
    content = base64.b64decode(data["images"][0]["thumbnail"].split(",")[1])
    small = Image.open(io.BytesIO(content))
    assert small.size == ((320, 160) if orientation == 1 else (160, 320))
    assert small.getpixel((5, 5))[0] > 200  # red is on the left, or above
    assert small.getpixel((small.width - 5, small.height - 5))[2] > 200


def test_exif_data_that_cannot_be_written_again_do_no_harm(tmp_path: Path) -> None:
    """A resolution that is text, as some cameras write it."""
    turned, resolution = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + resolution + b"\0" * 4
    Image.new("RGB", (2000, 1000)).save(tmp_path / "photo.jpg", exif=exif)
    assert data_url(tmp_path / "photo.jpg", 100)
    assert as_picture(tmp_path / "photo.jpg").size == (1000, 2000)


def test_pictures_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    numbers = made_report(images=6)
    images = write_pictures(numbers, tmp_path / "images")
    (images / numbers["images"][2]["file"]).unlink()
    (images / numbers["images"][4]["file"]).write_bytes(b"no picture")
    index = write_page(numbers, images, tmp_path / "report")
    (said,) = [x for x in json.loads((tmp_path / "report" / "report.json").read_text())["left_out"] if "read" in x]
    assert "2 of 6" in said
    assert numbers["images"][2]["file"] in said
    assert [x["thumbnail"] is None for x in read_data(index)["images"]] == [False, False, True, False, True, False]


def test_page_keeps_to_its_bound_and_tells_what_it_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = made_report(images=40)
    numbers["cases"] = {kind: [] for kind in numbers["cases"]} | {"missed": [[33, 1], [34, 0]], "worst_images": [35]}
    numbers["label_errors"][0]["image"] = 36
    images = write_pictures(numbers, tmp_path / "images")
    whole = write_page(numbers, images, tmp_path / "whole")
    bound = 3 * whole.stat().st_size // 4
    monkeypatch.setattr(page, "LARGEST_PAGE", bound)
    index = write_page(numbers, images, tmp_path / "small")
    assert bound * 0.9 < index.stat().st_size <= bound
    data = read_data(index)
    assert 4 < len(data["images"]) < 40
    assert f"{40 - len(data['images'])} of the gallery's 40 images" in index.read_text("utf-8").replace("&#39;", "'")
    # What is mentioned stays, and is mentioned by its new place.
    ids = {image["id"] - 1: place for place, image in enumerate(data["images"])}
    assert data["cases"]["missed"] == [[ids[33], 1], [ids[34], 0]]
    assert data["cases"]["worst_images"] == [ids[35]]
    assert data["label_errors"][0]["image"] == ids[36]
    assert len(json.loads((tmp_path / "small" / "report.json").read_text())["images"]) == 40


def test_large_report_has_at_most_ten_megabytes(tmp_path: Path) -> None:
    numbers = made_report(images=200, classes=365)
    for image in numbers["images"]:
        image |= {"width": 400, "height": 300, "file": f"{image['id'] % 4}.png"}
        image["found"] = image["found"] * 25  # as many as a report has
        image["truth"] = image["truth"] * 10
    images = write_pictures(numbers, tmp_path / "images")  # noise: the worst case of JPEG
    index = write_page(numbers, images, tmp_path / "report")
    assert index.stat().st_size <= 10_000_000
    data = read_data(index)
    assert len(data["images"]) > 150
    assert len(data["confusion"]["classes"]) == MOST_CLASSES
    assert "Only the 40 most confused of 365 classes" in index.read_text("utf-8")


def test_most_confused_classes_are_those_taken_for_another() -> None:
    numbers = made_report(classes=60)
    numbers["confusion"]["cells"] = [[50, 3, 9, []], [-1, 59, 99, []], [58, 58, 99, []], [57, -1, 99, []]]
    chosen = most_confused(numbers)
    assert len(chosen) == MOST_CLASSES
    assert {3, 50} <= set(chosen)
    assert not {57, 58, 59} & set(chosen)


def test_shares_of_the_confusion_matrix_count_what_is_not_shown(tmp_path: Path) -> None:
    numbers = made_report(images=1, classes=60)
    numbers["confusion"]["cells"] = taken_for_each_other()
    data = read_data(write_page(numbers, tmp_path, tmp_path / "report"))["confusion"]
    assert data["classes"] == list(range(40))
    assert data["totals"][:2] == [40, 100]  # of class 0, 10 are right and 30 taken for classes that are not shown
    assert data["totals"][-1] == 8  # found where there is nothing
    assert sum(count for truth, _, count, _ in data["cells"] if truth == 0) == 20
    shares = confusion_shares(numbers, data["classes"])
    assert shares.shape == (41, 41)
    assert shares[0, 0] == 25
    assert shares[-1, 0] == 37.5


def test_curves_are_thinned_but_keep_their_peak_and_their_ends(tmp_path: Path) -> None:
    curve = {iteration: 1.0 for iteration in range(5000)} | {1777: 9.0}
    index = write_page(made_report(images=0), tmp_path, tmp_path / "report", {"run": {"total_loss": curve}})
    thinned = read_data(index)["curves"]["run"]["total_loss"]
    assert len(thinned) <= page.POINTS
    assert thinned[0] == [0, 1.0]
    assert [1777, 9.0] in thinned
    assert thinned[-1] == [4999, 1.0]


@pytest.mark.parametrize("write", [write_page, write_comparison_page])
def test_report_of_another_format_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format 2, not 1"):
        write(made_report() | {"format": 2}, tmp_path, tmp_path / "report")


def test_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    numbers = made_report(images=0)
    numbers["metrics"]["AP"]["value"] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write_page(numbers, tmp_path, tmp_path / "report")
    assert not (tmp_path / "report" / "index.html").exists()


def test_comparison_has_its_numbers_and_plots(tmp_path: Path) -> None:
    numbers = made_comparison()
    images = write_pictures(numbers, tmp_path / "images")
    index = write_comparison_page(numbers, images, tmp_path / "report")
    written = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert {key: written[key] for key in numbers} == numbers
    assert plots(tmp_path / "report") == {"differences", "differences_by_class"}
    assert read_data(index)["worse"] == [2]
    assert "first <run>" not in index.read_text("utf-8")


def test_where_boxes_lie_is_said_with_its_direction(tmp_path: Path) -> None:
    text = write_page(made_report(), tmp_path, tmp_path / "report").read_text("utf-8")
    (table,) = re.findall(r'<table class="bars" id="placement">.*?</table>', text, re.DOTALL)
    rows = [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in table.split("</tr>")[:-1]]
    assert rows[0] == "Centre to the left 14.2 % significant −17.0 to −12.1"
    assert rows[1].startswith("Centre too low 0.5 % not significant")
    without = write_page(made_report() | {"placement": None}, tmp_path, tmp_path / "without").read_text("utf-8")
    assert "Where boxes lie" not in without


@pytest.mark.parametrize(("drawn", "shown"), [((1500, 900), (1200, 720)), ((600, 1300), (600, 1300))])
def test_picture_of_the_corruptions_is_in_the_page(
    drawn: tuple[int, int], shown: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("RGB", drawn, "red").save(tmp_path / "corruptions.jpg")
    robustness = made_robustness() | {"sheet": str(tmp_path / "corruptions.jpg")}
    index = write_page(made_report(images=1), tmp_path, tmp_path / "report", robustness=robustness)
    chapter = index.read_text("utf-8").split('<section id="robustness"')[1]
    alt, content = re.findall(r'<img [^>]*alt="([^"]+)" src="data:image/jpeg;base64,([^"]+)">', chapter)[0]
    assert "under every corruption" in alt
    assert chapter.index("</table>") < chapter.index("<img ")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.size == shown
    assert picture.getpixel((5, 5))[0] > 200
    written = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    assert written["robustness"] == made_robustness()
    assert index.read_text("utf-8").count(content) == 1


@pytest.mark.parametrize("sheet", ["missing.jpg", None])
def test_robustness_without_its_picture(sheet: str | None, tmp_path: Path) -> None:
    robustness = made_robustness() | ({"sheet": str(tmp_path / sheet)} if sheet else {})
    index = write_page(made_report(images=1), tmp_path, tmp_path / "report", robustness=robustness)
    assert "<img " not in index.read_text("utf-8").split('<section id="robustness"')[1].split("</section>")[0]
    left_out = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))["left_out"]
    assert [f"{tmp_path / 'missing.jpg'}" in sentence for sentence in left_out].count(True) == bool(sheet)


def test_picture_of_the_corruptions_counts_in_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = made_report(images=20)
    images = write_pictures(numbers, tmp_path / "images")
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "corruptions.jpg")
    without = write_page(numbers, images, tmp_path / "without", robustness=made_robustness())
    bound = without.stat().st_size + 5000
    monkeypatch.setattr(page, "LARGEST_PAGE", bound)
    shown = []
    for robustness in (made_robustness(), made_robustness() | {"sheet": str(tmp_path / "corruptions.jpg")}):
        index = write_page(numbers, images, tmp_path / "bounded", robustness=robustness)
        assert index.stat().st_size <= bound
        shown.append(len(read_data(index)["images"]))
    assert 4 < shown[1] < shown[0]


def text_of(index: Path, pattern: str) -> str:
    """The text of the first element that matches, without tags."""
    found = re.search(pattern, index.read_text("utf-8"), re.DOTALL)
    assert found
    return " ".join(re.sub("<[^>]*>", " ", found[0]).split())


def test_intervals_of_slices_are_text_too(tmp_path: Path) -> None:
    index = write_page(made_report(images=1), tmp_path, tmp_path / "report")
    assert "small size 9 66.7 40.0 to 90.0 30.0" in text_of(index, r"<caption>By size.*?</table>")


def test_limit_of_detections_is_of_each_class(tmp_path: Path) -> None:
    numbers = made_report(images=1)
    numbers["dataset"]["detections_counted"] = 3
    index = write_page(numbers, tmp_path, tmp_path / "report")
    said = text_of(index, r'<section id="glance".*?</section>')
    assert "4 detections, of which the best 100 of each image and class count (3)." in said


@pytest.mark.parametrize(("distance", "shown"), [(1.234, "1.23"), (0.0412, "0.041"), (None, "–")])
def test_distances_have_the_digits_that_tell_them_apart(distance: float | None, shown: str, tmp_path: Path) -> None:
    numbers = made_report(images=1)
    numbers["queries"]["ATD100"] = distance
    index = write_page(numbers, tmp_path, tmp_path / "report")
    assert text_of(index, r"<dt>ATD\(100\)</dt><dd>.*?</dd>") == f"ATD(100) {shown}"


def test_comparison_has_the_training_curves_of_both(tmp_path: Path) -> None:
    index = write_comparison_page(made_comparison(), tmp_path, tmp_path / "report", made_curves())
    assert read_data(index)["curves"].keys() == made_curves().keys()
    assert "curves" in plots(tmp_path / "report")
    assert "Training curves" in index.read_text("utf-8")
    without = write_comparison_page(made_comparison(), tmp_path, tmp_path / "report")
    assert "Training curves" not in without.read_text("utf-8")
    assert "curves" not in plots(tmp_path / "report")
