"""The page of a report in a browser without a window, from a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dino_d2.report.page import write_comparison_page, write_page
from tests.browser import CHROMIUM, expect, sync_api
from tests.report.made_report import (
    NASTY,
    made_comparison,
    made_curves,
    made_report,
    made_robustness,
    taken_for_each_other,
    write_pictures,
)

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const rgb = channels(getComputedStyle(node).backgroundColor.replace(/color\\(srgb (.*)\\)/,
        (_, rest) => rest.split(" ").slice(0, 3).map((c) => 255 * c).join(",")));
      if (rgb.length < 4 || rgb[3] > 0.99) return rgb;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() && !node.disabled
    && !node.closest(".tag, option")
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return texts.map((node) => {
    const style = getComputedStyle(node);
    const [a, b] = [light(channels(node.closest("svg") ? style.fill : style.color)), light(ground(node))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.slice(0, 30)];
  });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    numbers = made_report(images=30)
    images = write_pictures(numbers, folder / "images")
    return write_page(numbers, images, folder / "r", made_curves(), made_robustness())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    numbers = made_comparison()
    return write_comparison_page(numbers, write_pictures(numbers, folder / "images"), folder / "r")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """`visit(path, **options)` opens a page. Whatever a test does there: nothing is written to the console, no script
    fails, and nothing but files is asked for."""
    tabs, errors, requests = [], [], []

    def open_page(path: Path, **options: Any) -> Any:
        tab = browser.new_page(**({"viewport": WIDE} | options))
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert not errors
    assert requests
    assert all(url.startswith(("file:", "data:")) for url in requests)


def column(tab: Any, table: str, number: int) -> list[str]:
    return tab.locator(f"{table} tbody tr > :nth-child({number})").evaluate_all("all => all.map(x => x.dataset.value)")


def boxes(tab: Any) -> int:
    return tab.locator("#gallery .box.found").count()


def test_every_section_is_there_and_names_are_text(report: Path, visit: Any) -> None:
    tab = visit(report)
    always = ["At a glance", "By class", "What goes wrong", "Pictures"]
    expect(tab.locator("main h2")).to_have_text([*always, "Likely label errors", "Training curves", "Robustness"])
    expect(tab.locator("h1")).to_have_text("Trees & <shrubs>")
    assert tab.locator("#class-table tbody th").all_inner_texts() == NASTY
    expect(tab.locator("#runs span")).to_have_text(["first <run>", "second"])
    expect(tab.locator(".figures").first).to_contain_text("51.2")
    expect(tab.locator(".figures").first).to_contain_text("48.0 to 54.1")
    expect(tab.locator(".figures div", has_text="AP medium")).to_contain_text("–")


def test_table_is_sorted_by_number_and_by_name_with_what_is_missing_last(report: Path, visit: Any) -> None:
    tab = visit(report)
    heading = tab.locator("#class-table").get_by_role("columnheader", name="Recall")
    heading.get_by_role("button").click()
    assert column(tab, "#class-table", 6) == ["62.0", "61.0", "60.0", ""]
    expect(heading).to_have_attribute("aria-sort", "descending")
    heading.get_by_role("button").click()
    assert column(tab, "#class-table", 6) == ["60.0", "61.0", "62.0", ""]
    tab.locator("#class-table").get_by_role("button", name="Class", exact=True).press("Enter")
    names = column(tab, "#class-table", 1)
    assert sorted(names) == sorted(NASTY)
    assert names[-1] == NASTY[2]  # Cyrillic after Latin
    expect(heading).not_to_have_attribute("aria-sort", re.compile(".*"))


def test_class_shows_its_curves_with_the_best_threshold(report: Path, visit: Any) -> None:
    tab = visit(report)
    tab.get_by_role("button", name=NASTY[2], exact=True).click()
    detail = tab.locator("#class-detail")
    expect(detail.locator("h3")).to_have_text(NASTY[2])
    expect(detail.locator("svg")).to_have_count(2)
    expect(detail.locator(".mark-text")).to_have_text("best: 0.50")
    assert len(detail.locator("polyline").first.get_attribute("points").split()) == 101
    tab.get_by_role("button", name=NASTY[3], exact=True).click()
    expect(detail).to_contain_text("No object of this class")
    expect(detail.locator("svg")).to_have_count(0)


def test_values_of_a_curve_are_told_by_pointer_and_by_arrow_keys(report: Path, visit: Any) -> None:
    tab = visit(report)
    chart = tab.locator("#class-detail svg").first
    chart.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    expect(tab.locator("#class-detail .readout").first).to_have_text("Recall 1: Precision 99.99")
    chart.hover()
    expect(tab.locator("#class-detail .readout").first).to_have_text(re.compile("Recall 4"))


def test_slider_decides_which_boxes_are_drawn(report: Path, visit: Any) -> None:
    tab = visit(report)
    expect(tab.locator("#gallery .card")).to_have_count(24)
    assert boxes(tab) == 3 * 24
    expect(tab.locator("#gallery-count")).to_contain_text("72 boxes")
    tab.locator("#threshold").fill("0.7")
    assert boxes(tab) == 2 * 24
    expect(tab.locator("#threshold-value")).to_have_text("0.70")
    tab.locator("#threshold").fill("0.05")
    assert boxes(tab) == 4 * 24
    expect(tab.locator("#gallery .summary").first).to_contain_text("2 of 2 found · 2 wrong")
    tab.get_by_role("button", name="Back to 0.40").click()
    assert boxes(tab) == 3 * 24
    expect(tab.locator("#gallery .summary").first).to_contain_text("1 of 2 found · 2 wrong")


def test_slider_reaches_the_faintest_boxes(tmp_path: Path, visit: Any) -> None:
    numbers = made_report(images=1)
    numbers["threshold"]["score"] = 0.0159
    numbers["images"][0]["found"][3][5] = 0.016
    tab = visit(write_page(numbers, tmp_path, tmp_path / "report"))
    assert boxes(tab) == 4
    expect(tab.locator("#threshold-value")).to_have_text("0.016")
    tab.locator("#threshold").fill("0.5")
    assert boxes(tab) == 3
    tab.locator("#threshold").fill("0.01")
    assert boxes(tab) == 4
    tab.locator("#gallery .card").click()
    viewer = tab.get_by_role("dialog")
    viewer.get_by_label("Score threshold").fill("0.02")
    expect(viewer.locator("tbody tr.found")).to_have_count(3)
    viewer.get_by_label("Score threshold").fill("0.01")
    expect(viewer.locator("tbody tr.found")).to_have_count(4)


def test_filters_choose_pictures_and_mark_their_cases(report: Path, visit: Any) -> None:
    tab = visit(report)
    filters = tab.locator("#filters")
    expect(filters.get_by_role("button", name="False")).to_be_disabled()
    filters.get_by_role("button", name="Sure but wrong").click()
    expect(tab.locator("#gallery .card")).to_have_count(1)
    expect(tab.locator("#gallery .box.found.marked")).to_have_class("box found wrong_class marked")
    filters.get_by_role("button", name="Worst images").click()
    expect(tab.locator("#gallery .file").first).to_contain_text("30 <a>")
    filters.get_by_role("button", name="Missed").click()
    expect(tab.locator("#gallery .card").first.locator(".box.truth.marked")).to_have_count(1)
    tab.get_by_role("combobox", name="Class").select_option(label=NASTY[0])
    expect(tab.locator("#gallery-count")).to_have_text("No picture.")
    tab.get_by_role("combobox", name="Class").select_option(label=NASTY[1])
    expect(tab.locator("#gallery-count")).to_contain_text("in the 24 pictures shown")
    tab.locator("#gallery-more").click()
    expect(tab.locator("#gallery .card")).to_have_count(30)
    expect(tab.locator("#gallery-count")).to_contain_text("90 boxes found with a score above 0.40, in the 30 pictures")
    expect(tab.locator("#gallery-more")).to_be_hidden()


def test_cell_of_the_confusion_matrix_opens_its_pictures(report: Path, visit: Any) -> None:
    tab = visit(report)
    tab.get_by_role("button", name=f"{NASTY[1]} found as {NASTY[2]}: 30").click()
    panel = tab.locator("#confusion-pictures")
    expect(panel.locator("h4")).to_have_text(f"{NASTY[1]} found as {NASTY[2]}: 30")
    expect(panel.locator(".card")).to_have_count(20)
    expect(panel.locator(".card").first.locator(".found.marked")).to_have_class("box found wrong_class marked")
    tab.get_by_role("button", name=f"{NASTY[1]} missed: 2").press("Enter")
    expect(panel.locator(".card")).to_have_count(1)
    expect(panel).to_contain_text("Not in the gallery: 1 image with the id 999.")
    expect(panel.locator(".card .truth.marked")).to_have_count(1)


def test_picture_opens_larger_and_can_be_turned_and_closed(report: Path, visit: Any) -> None:
    tab = visit(report)
    tab.locator("#gallery .card").nth(1).click()
    viewer = tab.get_by_role("dialog")
    expect(viewer).to_be_visible()
    expect(viewer.locator("h2")).to_have_text("2 <a> & 'b' #1 狗.png")
    loaded = "node => new Promise(done => node.complete ? done(node.src) : node.onload = () => done(node.src))"
    picture = viewer.locator("img")
    assert picture.evaluate(loaded).startswith("file:")  # the full picture, not the small one
    assert picture.evaluate("node => node.naturalWidth") == 160
    expect(viewer.locator("tbody tr")).to_have_count(4)  # one missed, three found
    viewer.get_by_label("Score threshold").fill("0.85")
    expect(viewer.locator("tbody tr.found")).to_have_count(1)
    assert boxes(tab) == 24  # the page follows
    viewer.locator("tbody tr.found").hover()
    expect(viewer.locator(".found.marked")).to_have_count(1)
    viewer.locator("tbody tr.found button").press("Enter")  # a closer look
    expect(viewer.locator("svg.boxes")).to_have_attribute("viewBox", "0 0 80 60")
    viewer.locator("tbody tr.found button").press("Enter")
    viewer.get_by_label("found").uncheck()
    expect(viewer.locator(".box.found")).to_have_count(0)
    viewer.locator("tbody tr.found button").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    expect(viewer.locator("h2")).to_contain_text("4 <a>")
    tab.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(tab.locator("#gallery .card").nth(1)).to_be_focused()


def test_missing_pictures_leave_a_page_that_works(tmp_path: Path, visit: Any) -> None:
    tab = visit(write_page(made_report(images=2), tmp_path / "nowhere", tmp_path / "report"))
    expect(tab.locator("#gallery .absent")).to_have_count(2)
    assert boxes(tab) == 6
    tab.locator("#gallery .card").first.click()
    expect(tab.get_by_role("dialog").locator(".absent")).to_be_visible()
    expect(tab.locator("footer")).to_contain_text("could not be read")


def test_page_without_cases_images_and_classes_with_objects_works(tmp_path: Path, visit: Any) -> None:
    numbers = made_report(images=0, classes=1)
    numbers |= {"queries": None, "f1": None, "confusion": {"cells": []}, "label_errors": []}
    numbers["cases"] = {kind: [] for kind in numbers["cases"]}
    tab = visit(write_page(numbers, tmp_path, tmp_path / "report"))
    expect(tab.locator("#gallery-count")).to_have_text("No picture.")
    expect(tab.locator("main h2")).to_have_text(["At a glance", "By class", "What goes wrong", "Pictures"])


def test_many_classes_can_be_searched_and_the_matrix_says_what_it_shows(tmp_path: Path, visit: Any) -> None:
    tab = visit(write_page(made_report(images=2, classes=365), tmp_path, tmp_path / "report"))
    expect(tab.locator(".matrix tbody tr")).to_have_count(41)
    expect(tab.locator("#errors")).to_contain_text("Only the 40 most confused of 365 classes are shown.")
    tab.get_by_label("Find").fill("CLASS 36")
    expect(tab.locator("#class-table tbody tr:visible")).to_have_count(6)  # 36 and 360 to 364


def test_colours_of_the_matrix_are_shares_of_all_objects_of_a_class(tmp_path: Path, visit: Any) -> None:
    numbers = made_report(images=1, classes=60)
    numbers["confusion"]["cells"] = taken_for_each_other()
    tab = visit(write_page(numbers, tmp_path, tmp_path / "report"))
    share = tab.locator('[data-truth="0"][data-found="0"]').evaluate("node => node.style.getPropertyValue('--share')")
    assert share == "50%"  # the root of 10 of 40
    expect(tab.locator("#errors")).to_contain_text("Colours are shares of all objects of a class")


@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_phone_scrolls_only_downwards(kind: str, visit: Any, request: pytest.FixtureRequest) -> None:
    tab = visit(request.getfixturevalue(kind), viewport=PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tab.locator(".card").first.click()
    viewer = tab.get_by_role("dialog")
    expect(viewer).to_be_visible()
    assert viewer.evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    assert viewer.locator(".frame").first.bounding_box()["width"] > 150


def test_long_paths_stay_readable_on_a_phone(tmp_path: Path, visit: Any) -> None:
    numbers = made_report(images=1)
    path = "/data/experiments/" + "run_with_a_long_name/" * 8 + "model_final.pth"
    numbers |= {
        "title": path,
        "about": {"weights": path, "machine_with_a_long_name_of_its_own": path, "config": "89ef"},
    }
    tab = visit(write_page(numbers, tmp_path, tmp_path / "report"), viewport=PHONE)
    tab.get_by_text("What was measured").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for text in tab.locator(".about dd").all():
        box = text.bounding_box()
        assert box["width"] > 300
        assert box["x"] + box["width"] <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_text_stands_out_in_both_modes(kind: str, scheme: str, visit: Any, request: pytest.FixtureRequest) -> None:
    tab = visit(request.getfixturevalue(kind), color_scheme=scheme)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(paper) < 60) == (scheme == "dark")
    measured = tab.evaluate(CONTRAST)
    assert len(measured) > 30
    assert [text for text in measured if text[0] < 4.5] == []  # as WCAG AA asks of small text


def test_keyboard_reaches_everything_in_order_and_sees_where_it_is(report: Path, visit: Any) -> None:
    tab = visit(report)
    reached = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached[0] == "To the content"
    wanted = ["By class", "AP50", NASTY[0], "confusion", "5", "30", "threshold", "threshold-reset"]
    places = [reached.index(name) for name in wanted]
    assert places == sorted(places)


def test_comparison_tells_what_is_chance_and_shows_pairs(comparison: Path, visit: Any) -> None:
    tab = visit(comparison)
    expect(tab.locator(".verdict")).to_have_text("second & last is better by 4.0 AP (95 % interval 1.0 to 7.0).")
    rows = tab.locator("#metric-table tbody tr")
    expect(rows.nth(0)).to_contain_text("+4.0")
    expect(rows.nth(0).locator("td").last).to_have_text("significant")
    expect(rows.nth(1).locator("td").last).to_have_text("not significant")
    expect(rows.nth(2).locator("td").last).to_have_text("–")
    tab.locator("#class-table").get_by_role("button", name="Difference").click()
    assert column(tab, "#class-table", 5) == ["4.0", "0.5", ""]
    expect(tab.locator("#better-pictures .card")).to_have_count(2)
    expect(tab.locator("#worse-pictures .card")).to_have_count(1)
    pair = tab.locator("#better-pictures .card").first
    assert [pair.locator(".frame").nth(i).locator(".box.found").count() for i in (0, 1)] == [3, 1]
    tab.locator("#threshold").fill("0.85")
    assert [pair.locator(".frame").nth(i).locator(".box.found").count() for i in (0, 1)] == [1, 1]
    pair.click()
    viewer = tab.get_by_role("dialog")
    expect(viewer.locator(".view h3")).to_have_text(["first <run>", "second & last"])
    expect(viewer.locator("img")).to_have_count(2)


def test_comparison_without_intervals_judges_nothing(tmp_path: Path, visit: Any) -> None:
    numbers = made_comparison()
    for row in (*numbers["metrics"].values(), *numbers["classes"]):
        row |= {"low": None, "high": None, "significant": False}
    tab = visit(write_comparison_page(numbers | {"better": [], "worse": []}, tmp_path, tmp_path / "report"))
    expect(tab.locator("#metric-table tbody tr td:last-child")).to_have_text(["–", "–", "–"])
    expect(tab.locator("#metric-table tbody tr").first).to_contain_text("+4.0")
    expect(tab.locator("#pictures .note")).to_have_text(["None.", "None."])


def test_each_detector_is_judged_by_what_it_found(tmp_path: Path, visit: Any) -> None:
    """Two objects of a class in almost one place: the first detector has found the second, the second the first."""
    numbers = made_comparison(images=1)
    numbers |= {"better": [0], "worse": []}
    image = numbers["images"][0]
    image["truth"] = [[10, 10, 30, 30, 0, 1, 0], [10, 10, 30.5, 30, 0, 0, 0]]
    image |= {"found_by_a": [0, 1], **{f"found_{name}": [[10, 10, 30.25, 30, 0, 0.9, "right"]] for name in "ab"}}
    tab = visit(write_comparison_page(numbers, tmp_path, tmp_path / "report"))

    def widths() -> list[str | None]:
        return [one.get_attribute("width") for one in tab.locator(".truth.missed").all()]

    assert widths() == ["20", "20.5"]
    tab.locator("#better-pictures .card").click()
    assert widths()[2:] == ["20", "20.5"]
