"""Records are held once a node."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.common import set_default_dataset_from_list_serialize_method

from dino_d2.data import share_on_node
from dino_d2.data.records import SharedRecords, load_records

ROOT = Path(__file__).resolve().parents[2]


def make_records(count: int) -> list[dict]:
    """Wide ones first; with crowds alone, with nothing, with an object, in turn."""
    kinds = [[{"category_id": 0, "iscrowd": 1}], [], [{"category_id": 0, "iscrowd": 1}, {"category_id": 1}]]
    return [
        {"file_name": f"{i}.png", "width": 2 * count - i, "height": count + i, "annotations": kinds[i % 3]}
        for i in range(count)
    ]


@pytest.fixture
def name(request: pytest.FixtureRequest):
    yield request.node.name
    DatasetCatalog.pop(request.node.name, None)
    MetadataCatalog.pop(request.node.name, None)


def test_records_are_what_they_were() -> None:
    records = make_records(9)
    shared = share_on_node(iter(records))
    assert list(shared) == records
    assert (shared[-1], shared[np.int64(2)], len(shared)) == (records[-1], records[2], 9)
    assert shared.wide.tolist() == [record["width"] > record["height"] for record in records]
    shared[0]["annotations"].clear()  # each access makes it anew
    assert shared[0] == records[0]
    with pytest.raises(IndexError):
        shared[9]
    assert len(share_on_node([])) == 0


def total(shared: SharedRecords, result) -> None:
    result.put((len(shared), shared[3], os.fstat(shared.descriptor).st_ino))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_see_the_same_memory(method: str) -> None:
    shared = share_on_node(make_records(9))
    context = multiprocessing.get_context(method)
    result = context.SimpleQueue()
    process = context.Process(target=total, args=(shared, result))
    process.start()
    assert result.get() == (9, make_records(9)[3], os.fstat(shared.descriptor).st_ino)
    process.join()
    assert process.exitcode == 0


def test_nothing_is_left_on_the_disk_nor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()  # also of earlier tests, whose files would be closed in between
    open_before = len(os.listdir("/proc/self/fd"))
    shared = share_on_node(make_records(9))
    # A file there, without a name. Its st_dev does not say so: in an overlay it differs from the folder's.
    assert os.readlink(f"/proc/self/fd/{shared.descriptor}").startswith(f"{tmp_path}/")
    assert os.fstat(shared.descriptor).st_nlink == 0
    assert list(tmp_path.iterdir()) == []
    del shared
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: os.fdopen(os.open("/dev/full", os.O_RDWR), "w+b"))
    with pytest.raises(OSError, match=rf"{tempfile.gettempdir()} has no space .*TMPDIR"):
        share_on_node(make_records(9))


class Records(list):
    """A list that can be watched."""


def test_list_of_a_data_set_is_not_kept(name: str) -> None:
    made = []

    def load() -> list[dict]:
        records = Records(make_records(9))
        made.append(weakref.ref(records))
        return records

    DatasetCatalog.register(name, load)
    loaded = load_records([name], filter_empty=False, needs_annotations=True)
    gc.collect()
    assert len(loaded) == 9
    assert [reference() for reference in made] == [None]


def test_pictures_without_objects_are_filtered_as_detectron2_does(name: str) -> None:
    DatasetCatalog.register(name, lambda: make_records(9))
    assert list(load_records([name, name], filter_empty=True, needs_annotations=True)) == make_records(9)[2::3] * 2
    DatasetCatalog[name] = lambda: make_records(2)
    with pytest.raises(ValueError, match=rf"{name}: no images with objects found"):
        load_records([name], filter_empty=True, needs_annotations=True)
    unannotated = [{"file_name": "a.png"}]
    DatasetCatalog[name] = lambda: unannotated
    assert list(load_records([name], filter_empty=True, needs_annotations=True)) == unannotated


def test_objects_of_each_class_are_counted_and_impossible_ones_refused(name: str) -> None:
    DatasetCatalog.register(name, lambda: make_records(9))
    MetadataCatalog.get(name).thing_classes = ["a"]
    with pytest.raises(AssertionError, match="category_id=1 for a dataset of 1 classes"):
        load_records([name], filter_empty=True, needs_annotations=True)


def test_detectron2s_data_sets_can_be_held_so() -> None:
    with set_default_dataset_from_list_serialize_method(share_on_node):
        dataset = DatasetFromList(make_records(9), copy=False)
    assert isinstance(dataset._lst, SharedRecords)
    assert [dataset[i] for i in range(9)] == make_records(9)


def test_processes_of_a_node_share_one_file_or_one_failure(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    command += [str(ROOT / "tests/data/share_in_parallel.py"), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))

    assert first["file"] == second["file"]
    assert first["records"] == second["records"]
    assert (len(first["records"]), first["wide"]) == (6, [False] * 4 + [True] * 2)
    assert second["wide"] == first["wide"]
    assert (first["calls"], second["calls"]) == (1, 0)  # loaded once
    assert first["classes"] == second["classes"] == ["a", "b"]
    assert first["left"] == second["left"] == []

    assert first["error"] == "OSError: the disk is gone"
    assert second["error"] == "RuntimeError: process 0, which reads the data for its node, failed: " + first["error"]
