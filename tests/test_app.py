"""The page of `dino-d2 app` in a browser without a window, with a model that was trained for it."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from dino_d2 import Detections, Detector, load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from tests.browser import CHROMIUM, expect, sync_api
from tests.synthetic import COLOURS, config_values, write_rectangles

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'dino-d2[app]'")

from dino_d2.app import Look, Session, build_page, detect, launch, to_coco

RECIPE = str(Path(__file__).resolve().parents[1] / "configs" / "dino_r50_4scale_12ep.yaml")
PICTURES = 4


class WatchedDetector(Detector):
    """Counts its calls, and waits in the one of number `waits_in` until `goes_on` is set."""

    calls = 0
    waits_in = 0
    goes_on = threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Detections:
        self.calls += 1
        if self.calls == self.waits_in:
            assert self.goes_on.wait(30)
        return super().__call__(*args, **options)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that knows the images beside it, in data/images, by heart."""
    folder = tmp_path_factory.mktemp("page")
    data = write_rectangles(folder / "data", count=PICTURES, size=128)
    values = [
        *config_values(data, folder / "out", "page_rectangles"),
        *("MODEL.DINO.CLASS_NAMES", str(list(COLOURS))),
        *("MODEL.DINO.NMS_THRESHOLD", "0.6"),
        *("MODEL.DINO.DN.NUMBER", "10"),
        *("SOLVER.IMS_PER_BATCH", str(PICTURES)),
        *("SOLVER.MAX_ITER", "240"),
        *("SOLVER.STEPS", "(200,)"),
    ]
    cfg = load_config(RECIPE, values)
    register_datasets(cfg)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    DINOTrainer(cfg).train()
    torch.set_num_threads(threads)
    (folder / "out" / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture(scope="module")
def photos(trained: Path) -> list[Path]:
    """The first has one red rectangle, the second a red one and two blue ones."""
    return [trained / "data" / "images" / f"{number}.png" for number in range(1, PICTURES + 1)]


@pytest.fixture(scope="module")
def detector(trained: Path) -> WatchedDetector:
    return WatchedDetector.from_pretrained(trained / "out", device="cpu")


@pytest.fixture(scope="module")
def connections() -> list[tuple]:
    """Where this process connects to or asks for the address of, from now on."""
    seen: list[tuple] = []

    def hear(event: str, arguments: tuple) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            seen.append((event, arguments[1][0]))
        elif event == "socket.getaddrinfo":
            seen.append((event, arguments[0]))

    sys.addaudithook(hear)
    return seen


@pytest.fixture(scope="module")
def address(detector: WatchedDetector, connections: list[tuple]) -> Iterator[str]:
    page = build_page(detector, "rectangles")
    yield launch(page, 7860)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: sync_api.Browser, address: str) -> Iterator[sync_api.Page]:
    """The page, freshly opened. Whatever a test does there: nothing else is asked for, no script fails."""
    requests, errors = [], []
    tab = browser.new_page(viewport={"width": 1400, "height": 1000})
    tab.set_default_timeout(20_000)
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(address)
    expect(tab.locator("#summary")).to_have_text("Upload images to begin.")
    yield tab
    tab.close()
    assert len(requests) > 10
    foreign = [
        url for url in requests if urlsplit(url).hostname != "127.0.0.1" and not url.startswith(("data:", "blob:"))
    ]
    assert not foreign
    assert not errors


def upload(tab: sync_api.Page, *paths: Path) -> None:
    tab.set_input_files("input[type=file]", list(paths))


def set_threshold(tab: sync_api.Page, threshold: float) -> None:
    tab.locator("#threshold input[type=range]").fill(f"{threshold:.2f}")


def says(tab: sync_api.Page, name: str, count: int) -> None:
    """The line above the image, and the rows of the table below it."""
    pattern = rf"{re.escape(name)} \(128 × 128\): {count} objects?\b"
    expect(tab.locator("#summary")).to_have_text(re.compile(pattern))
    expect(tab.locator("#table").get_by_role("grid")).to_have_attribute("aria-rowcount", str(count + 1))  # the head


def shown(tab: sync_api.Page) -> np.ndarray:
    body = tab.request.get(tab.locator("#shown img").get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


def coco_of(tab: sync_api.Page) -> dict[str, Any]:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download COCO JSON").click()
    assert download.value.suggested_filename == "detections.json"
    return json.loads(Path(download.value.path()).read_text())


def middle(scores: np.ndarray, place: int) -> float:
    """A threshold between the score at this place and the next one, at least 0.02 from both."""
    low, high = scores[place + 1], scores[place]
    assert high - low > 0.04, f"the model's scores are too close: {scores}"
    return float(low + high) / 2


def test_rectangles_are_found_drawn_and_listed(
    tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]
) -> None:
    upload(tab, photos[0])
    found = detector(photos[0], threshold=detector.threshold)
    says(tab, "1.png", len(found))
    best = found[0]
    assert best.name == "red"
    np.testing.assert_allclose(best.box, (49, 29, 49 + 57, 29 + 46), atol=5)
    name, *numbers = tab.locator("#table [role=row][data-index='0'] [role=gridcell]").all_inner_texts()
    assert name.strip() == "red"
    np.testing.assert_allclose([float(number) for number in numbers], [best.score, *best.box], atol=0.05)

    drawn = shown(tab)
    plain = np.asarray(Image.open(photos[0]).resize(drawn.shape[1::-1])).astype(int)
    changed = np.abs(drawn - plain).max(2) > 60
    x1, y1, x2, y2 = (np.array(best.box) * drawn.shape[0] / 128).round().astype(int)
    bottom, right = changed[y2 - 4 : y2 + 5, x1:x2], changed[y1:y2, x2 - 4 : x2 + 5]
    assert bottom.any(0).mean() > 0.9
    assert right.any(1).mean() > 0.9
    assert changed[: y1 // 2].mean() < 0.01


def test_slider_starts_at_the_threshold_of_the_weights(tab: sync_api.Page, detector: WatchedDetector) -> None:
    assert detector.model.assumptions.score_threshold == detector.threshold != 0.3
    slider = tab.locator("#threshold input[type=range]")
    assert float(slider.input_value()) == pytest.approx(detector.threshold, abs=6e-4)


def test_slider_and_classes_choose_without_the_model(
    tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]
) -> None:
    everything = detector(photos[1], threshold=0.0)
    upload(tab, photos[1])
    says(tab, "2.png", len(everything.above(detector.threshold)))
    first, calls = shown(tab), detector.calls
    threshold = middle(everything.scores, 0)
    set_threshold(tab, threshold)
    says(tab, "2.png", 1)
    assert np.abs(shown(tab) - first).max() > 60
    set_threshold(tab, 0.05)
    says(tab, "2.png", len(everything.above(0.05)))

    tab.locator("#classes input").click()
    tab.get_by_role("option", name="red").click()
    reds = len(everything.above(0.05).of("red"))
    assert 0 < reds < len(everything.above(0.05))
    says(tab, "2.png", reds)
    assert detector.calls == calls


def test_coco_json_holds_what_is_shown_of_all_pictures(
    tab: sync_api.Page, detector: WatchedDetector, photos: list[Path], tmp_path: Path
) -> None:
    found = [detector(photo, threshold=0.2) for photo in photos[:2]]
    upload(tab, *photos[:2])
    says(tab, "1.png", len(detector(photos[0], threshold=detector.threshold)))
    set_threshold(tab, 0.2)
    says(tab, "1.png", len(found[0]))
    expect(tab.locator("#queue").get_by_role("button", name="Thumbnail")).to_have_count(2)  # both are processed
    (tmp_path / "coco.json").write_text(json.dumps(coco_of(tab)))
    coco = COCO(str(tmp_path / "coco.json"))
    assert [coco.imgs[number]["file_name"] for number in (1, 2)] == ["1.png", "2.png"]
    assert {category["id"]: category["name"] for category in coco.cats.values()} == {1: "red", 2: "blue"}
    for number, detections in enumerate(found, start=1):
        annotations = coco.imgToAnns[number]
        assert [coco.cats[entry["category_id"]]["name"] for entry in annotations] == detections.names
        boxes = np.array([entry["bbox"] for entry in annotations])
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], detections.boxes[:, 2:], rtol=1e-5)
        np.testing.assert_allclose([entry["score"] for entry in annotations], detections.scores, rtol=1e-5)


def test_queue_shows_the_picture_that_is_chosen_and_grows_and_shrinks(
    tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]
) -> None:
    counts = [len(detector(photo, threshold=detector.threshold)) for photo in photos]
    calls = detector.calls
    upload(tab, *photos[:2])
    says(tab, "1.png", counts[0])
    thumbnails = tab.locator("#queue").get_by_role("button", name="Thumbnail")
    expect(thumbnails).to_have_count(2)
    thumbnails.nth(1).click()
    says(tab, "2.png", counts[1])
    assert detector.calls == calls + 2

    upload(tab, photos[2])  # joins those that are there
    expect(thumbnails).to_have_count(3)
    says(tab, "2.png", counts[1])
    assert detector.calls == calls + 3
    tab.get_by_role("button", name="Remove this file").nth(1).click()
    expect(thumbnails).to_have_count(2)
    says(tab, "1.png", counts[0])
    assert [image["file_name"] for image in coco_of(tab)["images"]] == ["1.png", "3.png"]
    assert detector.calls == calls + 3


def test_what_is_chosen_while_the_model_works_stays_chosen(
    tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]
) -> None:
    counts = [len(detector(photos[1], threshold=threshold)) for threshold in (detector.threshold, 0.05)]
    assert counts[0] < counts[1]
    detector.waits_in = detector.calls + 3
    upload(tab, *photos[:3])
    thumbnails = tab.locator("#queue").get_by_role("button", name="Thumbnail")
    expect(thumbnails).to_have_count(2)
    expect(tab.locator("#note")).to_have_text(re.compile(r"Processing 3\.png \(3 of 3\)"))
    thumbnails.nth(1).click()
    says(tab, "2.png", counts[0])
    set_threshold(tab, 0.05)
    says(tab, "2.png", counts[1])
    detector.goes_on.set()
    expect(thumbnails).to_have_count(3)
    expect(tab.locator("#note")).to_have_text("")
    says(tab, "2.png", counts[1])
    expect(thumbnails.nth(1)).to_have_class(re.compile("selected"))


def test_broken_file_gets_a_message_and_the_page_lives_on(
    tab: sync_api.Page, detector: WatchedDetector, photos: list[Path], tmp_path: Path
) -> None:
    texts = tmp_path / "text.jpg", tmp_path / "notes.txt"
    for text in texts:
        text.write_text("no image at all")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photos[0].read_bytes()[:3000])
    upload(tab, *texts, cut, photos[0])
    says(tab, "1.png", len(detector(photos[0], threshold=detector.threshold)))
    note = tab.locator("#note")
    expect(note).to_have_text(
        re.compile(
            r"text\.jpg cannot be read as an image: unknown format.*notes\.txt cannot be .*unknown format"
            r".*cut\.png cannot be .*truncated"
        )
    )
    assert str(tmp_path) not in note.inner_text()
    assert "Traceback" not in tab.content()
    assert [image["file_name"] for image in coco_of(tab)["images"]] == ["1.png"]


def test_other_tiles_are_looked_at_anew(tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]) -> None:
    upload(tab, photos[0])
    says(tab, "1.png", len(detector(photos[0], threshold=detector.threshold)))
    set_threshold(tab, 0)
    says(tab, "1.png", len(detector(photos[0], threshold=0)))
    in_tiles = len(detector(photos[0], threshold=0, tile=80))
    calls = detector.calls
    tab.locator("#tile input").fill("80")
    tab.get_by_role("button", name="Detect again").click()
    says(tab, "1.png", in_tiles)
    assert detector.calls == calls + 1
    tab.locator("#tile input").fill("3")
    tab.get_by_role("button", name="Detect again").click()
    expect(tab.locator("#note")).to_have_text(re.compile("Tiles of 3 pixels are too small"))
    assert detector.calls == calls + 1


def test_augmented_detection_is_asked_for(tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]) -> None:
    upload(tab, photos[0])
    set_threshold(tab, 0)
    says(tab, "1.png", len(detector(photos[0], threshold=0)))
    plain, augmented = (detector(photos[0], threshold=0, augment=on).scores[:5].round(3) for on in (False, True))
    new = next(score for score in augmented.tolist() if score not in plain.tolist())
    tab.locator("#augment input").check()
    tab.get_by_role("button", name="Detect again").click()
    expect(tab.locator("#table")).to_contain_text(f"{new:.3g}")


def test_empty_field_of_tiles_means_no_tiles(tab: sync_api.Page, detector: WatchedDetector, photos: list[Path]) -> None:
    tab.locator("#tile input").fill("")
    upload(tab, photos[0])
    says(tab, "1.png", len(detector(photos[0], threshold=detector.threshold)))


def test_picture_too_large_for_the_memory_is_named(detector: WatchedDetector, photos: list[Path]) -> None:
    class Full(WatchedDetector):
        def __call__(self, *args: Any, **options: Any) -> Detections:
            raise torch.OutOfMemoryError("tried to allocate 200 GiB")

    with pytest.raises(ValueError, match=r"^1\.png does not fit into device memory: use tiles"):
        detect(Full(detector.cfg, detector.model), str(photos[0]), Look())


def test_classes_without_names_are_numbered(detector: WatchedDetector, photos: list[Path]) -> None:
    nameless = WatchedDetector(detector.cfg, detector.model)
    nameless.class_names = ()
    picture = detect(nameless, str(photos[1]), Look())
    session = Session({"2.png": picture}, threshold=0.05, classes=["class 1"])
    coco = to_coco(session, nameless.labels)
    assert coco["categories"] == [{"id": 1, "name": "class 0"}, {"id": 2, "name": "class 1"}]
    blue = detector(photos[1], threshold=0.05).of("blue")
    assert [entry["category_id"] for entry in coco["annotations"]] == [2] * len(blue)


def test_pictures_of_one_name_are_different_files_in_coco(
    detector: WatchedDetector, photos: list[Path], tmp_path: Path
) -> None:
    pictures = {}
    for folder, name in (("a", "1.png"), ("b", "1.png"), ("c", "1.png"), ("d", "1 (2).png")):
        path = tmp_path / folder / name
        path.parent.mkdir()
        pictures[str(path)] = detect(detector, str(shutil.copy(photos[0], path)), Look())
    images = to_coco(Session(pictures), detector.labels)["images"]
    assert [image["file_name"] for image in images] == ["1.png", "1 (3).png", "1 (4).png", "1 (2).png"]


def test_large_and_small_pictures_are_drawn_on_in_sizes_for_the_eye(detector: WatchedDetector, tmp_path: Path) -> None:
    for size, shown in (((40, 30), (1024, 768)), ((3000, 1500), (2048, 1024)), ((1200, 7), (1200, 7))):
        Image.new("RGB", size).save(tmp_path / "picture.png")
        picture = detect(detector, str(tmp_path / "picture.png"), Look())
        session = Session({"": picture}, threshold=0)
        assert picture.found.image_size == size[::-1]
        assert picture.draw(session.select(picture)).size == shown


def test_two_visitors_have_queues_of_their_own(
    tab: sync_api.Page, browser: sync_api.Browser, address: str, photos: list[Path]
) -> None:
    upload(tab, photos[0])
    expect(tab.locator("#summary")).to_have_text(re.compile(r"1\.png"))
    other = browser.new_page()
    other.goto(address)
    expect(other.locator("#summary")).to_have_text("Upload images to begin.")
    upload(other, photos[1])
    expect(other.locator("#summary")).to_have_text(re.compile(r"2\.png"))
    assert [image["file_name"] for image in coco_of(other)["images"]] == ["2.png"]
    assert [image["file_name"] for image in coco_of(tab)["images"]] == ["1.png"]
    other.close()


def test_title_names_the_model(tab: sync_api.Page) -> None:
    assert tab.title() == "DINO · rectangles"
    expect(tab.get_by_role("heading", level=1)).to_have_text("DINO · rectangles")


def test_server_speaks_with_loopback_alone(tab: sync_api.Page, connections: list[tuple], photos: list[Path]) -> None:
    upload(tab, photos[0])
    expect(tab.locator("#summary")).to_have_text(re.compile(r"1\.png"))
    assert connections  # Gradio asks its own server whether it is up
    assert {host for _, host in connections} <= {"127.0.0.1", b"127.0.0.1"}
