from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from dino_d2 import load_config
from dino_d2.data import class_names, register_datasets
from tests.synthetic import config_values, write_rectangles

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml")


def test_data_set_of_the_config_is_registered_with_its_names(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=3, size=64, empty=1)
    cfg = load_config(RECIPE, config_values(data, tmp_path / "out", "registered"))
    register_datasets(cfg)
    register_datasets(cfg)  # again changes nothing
    assert len(DatasetCatalog.get("registered")) == 3
    assert MetadataCatalog.get("registered").thing_classes == ["red", "blue"]
    assert class_names(cfg) == ["red", "blue"]


def test_missing_file_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.json"
    cfg = load_config(RECIPE, config_values((nowhere, tmp_path), tmp_path / "out", "missing"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*'missing'"):
        register_datasets(cfg)


def test_name_of_another_data_set_is_refused(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=1, size=64)
    cfg = load_config(RECIPE, config_values(data, tmp_path / "out", "coco_2017_val"))
    with pytest.raises(ValueError, match="coco_2017_val"):
        register_datasets(cfg)


def test_entry_of_another_length_is_refused() -> None:
    cfg = load_config(RECIPE, ["DATASETS.COCO_FORMAT", "[['a', 'b']]"])
    with pytest.raises(ValueError, match="annotation file, image folder"):
        register_datasets(cfg)


def test_names_in_the_config_come_first() -> None:
    assert class_names(load_config(RECIPE, ["MODEL.DINO.CLASS_NAMES", "['x', 'y']"])) == ["x", "y"]


def test_without_a_registered_data_set_there_are_no_names() -> None:
    assert class_names(load_config(RECIPE, ["DATASETS.TRAIN", "('x',)", "DATASETS.TEST", "()"])) == []
