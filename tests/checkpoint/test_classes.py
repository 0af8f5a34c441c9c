"""Classes are matched by name; the table of synonyms, against Objects365's own list and COCO's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dino_d2 import load_config
from dino_d2.checkpoint.classes import match_classes
from dino_d2.checkpoint.convert import COCO

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COCO_NAMES = [category["name"] for category in COCO]

# Numbers (from 0) of Objects365's classes in the order of COCO's 80, as programs published with weights for both have
# them (D-FINE's), but for skis: there shoes (148), here "Skiboard".
OBJECTS365_ROWS = [
    0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96,
    144, 295, 178, 180, 38, 39, 13, 43, 120, 219, 119, 173, 165, 154, 137, 113, 145, 146, 204, 8,
    35, 10, 88, 84, 93, 26, 112, 82, 265, 104, 141, 152, 234, 143, 150, 97, 2, 50, 25, 75,
    98, 153, 37, 73, 115, 132, 106, 61, 163, 134, 277, 81, 133, 18, 94, 30, 169, 70, 328, 226,
]  # fmt: skip


@pytest.fixture(scope="module")
def objects365() -> list[str]:
    return load_config(str(CONFIGS / "objects365" / "Base-Objects365.yaml")).MODEL.DINO.CLASS_NAMES


def test_objects365_has_365_classes(objects365: list[str]) -> None:
    assert len(objects365) == len(set(objects365)) == 365
    assert [objects365[i] for i in (0, 37, 182, 364)] == ["Person", "Moniter/TV", "Sausage", "Table Tennis "]


@pytest.mark.parametrize("number", range(80), ids=COCO_NAMES)
def test_class_of_coco_finds_its_class_of_objects365(number: int, objects365: list[str]) -> None:
    alone = match_classes(objects365, [COCO_NAMES[number]])
    assert alone.rows == (OBJECTS365_ROWS[number],)
    assert match_classes(objects365, COCO_NAMES).rows[number] == OBJECTS365_ROWS[number]


def test_classes_of_coco_are_found_from_objects365_too(objects365: list[str]) -> None:
    match = match_classes(COCO_NAMES, objects365)
    assert match.dropped == []
    assert all(match.rows[theirs] == number for number, theirs in enumerate(OBJECTS365_ROWS))
    assert len(match.new) == 365 - 80


def test_corrected_spellings_of_objects365_serve_as_well() -> None:
    assert match_classes(["Monitor/TV", "Dining Table"], ["dining table", "tv"]).rows == (1, 0)


def test_nearest_spelling_wins_and_a_row_serves_once() -> None:
    theirs = ["luggage", "Suitcase", "suitcase", "traffic_light"]
    match = match_classes(theirs, ["suitcase", "SUITCASE", "Luggage", "Traffic Light", "traffic-light", "zebra"])
    assert match.rows == (2, 1, 0, 3, None, None)
    assert match.new == ["traffic-light", "zebra"]
    assert match.dropped == []


def test_table_says_what_became_of_each_class() -> None:
    table = match_classes(["Wild Bird", "cat", "Awning"], ["cat", "bird", "kiosk"]).table()
    assert "copied (2): cat, Wild Bird -> bird" in table
    assert "newly initialised (1): kiosk" in table
    assert "dropped (1): Awning" in table


def test_rows_are_copied_and_the_others_left() -> None:
    match = match_classes(["a", "b", "c"], ["c", "new", "a"])
    theirs, ours = torch.tensor([[1.0], [2.0], [3.0], [9.0]]), torch.tensor([[-1.0], [-2.0], [-3.0], [-9.0]])
    assert match.copy_rows(theirs[:3], ours[:3]).flatten().tolist() == [3, -2, 1]
    assert match.copy_rows(theirs, ours).flatten().tolist() == [3, -2, 1, 9]  # the unused last row of denoising
    assert ours.flatten().tolist() == [-1, -2, -3, -9]


def test_no_class_in_common_copies_nothing() -> None:
    ours = torch.tensor([-1.0])
    assert match_classes(["a"], ["b"]).copy_rows(torch.tensor([1.0]), ours).tolist() == [-1]
