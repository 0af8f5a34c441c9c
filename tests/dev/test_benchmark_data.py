"""dev/benchmark_data.py: what it generates and compares, not how fast it is."""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

sys.path.insert(0, str(Path(__file__).parents[2] / "dev"))

import benchmark_data
from benchmark_data import KINDS, NAME, WAYS, Case, as_row, build, pss, samples_per_second, write_dataset
from dino_d2.data import datasets


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)
    datasets._REGISTERED.pop(NAME, None)


@pytest.mark.parametrize(("kind", "polygons", "objects"), [("coco", True, 730), ("objects365", False, 1470)])
def test_generated_set_has_the_proportions_of_the_real_one(
    kind: str, polygons: bool, objects: int, tmp_path: Path
) -> None:
    annotations, images = write_dataset(tmp_path, replace(KINDS[kind], images=100))
    content = json.loads(annotations.read_text())
    assert (len(content["images"]), len(content["annotations"])) == (100, objects)
    assert all(("segmentation" in annotation) == polygons for annotation in content["annotations"])
    assert all((images / image["file_name"]).is_file() for image in content["images"])
    size = annotations.stat().st_size / 100 * KINDS[kind].images
    assert 300e6 < size < 4e9  # COCO's has 450 MB


def test_both_ways_read_the_same(tmp_path: Path) -> None:
    kind = replace(KINDS["coco"], images=40)
    annotations, images = write_dataset(tmp_path, kind)
    found = []
    for way in WAYS:
        records, loader, batches = build(Case(way, str(annotations), str(images), kind.classes, 1, (), 0.1))
        loader.num_workers = 0 if way == WAYS[0] else 1
        assert samples_per_second(batches, 0.1) > 0
        found.append([records[index] for index in range(len(records))])
        DatasetCatalog.pop(NAME)
        MetadataCatalog.pop(NAME)
    for record in found[1]:
        for annotation in record["annotations"]:
            del annotation["segmentation"]
    assert found[0] == found[1]


def test_memory_that_is_taken_is_measured() -> None:
    before = pss()
    taken = mmap.mmap(-1, 50 * 2**20)  # the heap may have as much to spare
    for _ in range(50):
        taken.write(os.urandom(2**20))
    assert 45 < pss() - before < 60
    assert pss(os.getpid()) > len(taken) / 2**20
    assert pss(2**22 + 1) == 0.0  # no such process


def test_row_has_the_highest_process_and_the_sum() -> None:
    case = Case("dino_d2", "", "", 1, 2, (1, 8), 1.0)
    first = {"start": 2.0, "steady": 10.0, "peak": 30.0, "peak of the node": 55.0, "1 workers": 5.0, "8 workers": 9.0}
    second = {"start": 3.0, "steady": 1.0, "peak": 40.0, "peak of the node": 55.0}
    row = as_row(case, [first, second])
    assert row == ["dino_d2", "3.0", "40", "55", "10", "11", "5.0", "9.0"]
    assert len(row) == len(benchmark_data.COLUMNS) + 2
