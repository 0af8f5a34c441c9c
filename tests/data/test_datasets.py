from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from dino_d2 import load_config
from dino_d2.data import (
    CocoFiles,
    ImageMapper,
    build_test_loader,
    build_train_loader,
    check_classes,
    class_names,
    load_config_for_files,
    register_datasets,
)
from dino_d2.data.coco import CocoRecords
from dino_d2.data.datasets import TRAIN_NAME, VAL_NAME
from dino_d2.engine import DINOTrainer
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


def test_names_of_a_set_registered_in_python_are_known_before_it_is_loaded(tmp_path: Path) -> None:
    """detectron2 reads them when it loads the data, which is after the model was built: its weights had no names."""
    json_file, images = write_rectangles(tmp_path / "data", count=3, size=64)
    register_coco_instances("registered_in_python", {}, str(json_file), str(images))
    register_coco_instances("registered_without_file", {}, str(tmp_path / "nowhere.json"), str(images))
    values = ["DATASETS.TRAIN", ("registered_in_python",), "DATASETS.TEST", ("registered_without_file",)]
    cfg = load_config(RECIPE, [*values, "MODEL.DINO.NUM_CLASSES", 2, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    assert class_names(cfg) == ["red", "blue"]
    assert build_model(cfg).assumptions.class_names == ("red", "blue")
    cfg.MODEL.DINO.NUM_CLASSES = 3
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 3.*registered_in_python has 2 categories"):
        check_classes(cfg, cfg.DATASETS.TRAIN)


def test_missing_file_is_named(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.json"
    cfg = load_config(RECIPE, config_values((nowhere, tmp_path), tmp_path / "out", "missing"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*'missing'"):
        register_datasets(cfg)


def test_data_that_are_not_needed_may_be_missing(tmp_path: Path) -> None:
    """Those that a model was trained with, on another machine."""
    data = write_rectangles(tmp_path / "data", count=1, size=64)
    cfg = load_config(RECIPE, config_values(data, tmp_path / "out", "needed"))
    cfg.DATASETS.COCO_FORMAT.append(["elsewhere", str(tmp_path / "nowhere.json"), str(tmp_path)])
    register_datasets(cfg, ["needed"])
    assert "elsewhere" not in DatasetCatalog
    assert len(DatasetCatalog.get("needed")) == 1
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json.*'elsewhere'"):
        register_datasets(cfg, ["needed", "elsewhere"])


def test_evaluation_refuses_a_byte_order_mark_before_training(tmp_path: Path) -> None:
    """pycocotools would, at the first evaluation."""
    data = write_rectangles(tmp_path / "data", count=1, size=64)
    data[0].write_text(data[0].read_text(), encoding="utf-8-sig")
    cfg = load_config(RECIPE, config_values(data, tmp_path / "out", "marked"))
    with pytest.raises(ValueError, match=r"annotations\.json begins with a byte order mark"):
        register_datasets(cfg)
    cfg.DATASETS.TEST = ()
    register_datasets(cfg)
    assert len(DatasetCatalog.get("marked")) == 1


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


@pytest.fixture
def two_sets(tmp_path: Path) -> Iterator[tuple[CocoFiles, CocoFiles]]:
    train = CocoFiles(*write_rectangles(tmp_path / "train", count=3, size=64))
    val = CocoFiles(*write_rectangles(tmp_path / "val", count=2, size=64))
    yield train, val
    for name in {TRAIN_NAME, VAL_NAME} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def set_categories(files: CocoFiles, categories: object) -> None:
    content = json.loads(files.annotations.read_text())
    files.annotations.write_text(json.dumps(content | {"categories": categories}))


def test_files_become_data_sets_with_their_classes(two_sets: tuple[CocoFiles, CocoFiles]) -> None:
    train, val = two_sets
    # In another order than that of the ids, and with a gap: classes are numbered by id.
    set_categories(train, [{"id": 7, "name": "red"}, {"id": 2, "name": "blue"}, {"id": 1, "name": "a thing"}])
    set_categories(val, [{"id": 1, "name": "a thing"}, {"id": 2, "name": "blue"}, {"id": 7, "name": "red"}])
    cfg = load_config_for_files(RECIPE, [], train, val)
    register_datasets(cfg)
    assert cfg.MODEL.DINO.NUM_CLASSES == 3
    assert cfg.MODEL.DINO.CLASS_NAMES == ["a thing", "blue", "red"] == class_names(cfg)
    assert (len(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])), len(DatasetCatalog.get(cfg.DATASETS.TEST[0]))) == (3, 2)
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes == cfg.MODEL.DINO.CLASS_NAMES
    assert cfg.TEST.EVAL_PERIOD > 0


def test_either_of_the_two_sets_may_be_missing(two_sets: tuple[CocoFiles, CocoFiles]) -> None:
    cfg = load_config_for_files(RECIPE, [], two_sets[0], None)
    assert (len(cfg.DATASETS.TRAIN), len(cfg.DATASETS.TEST), cfg.TEST.EVAL_PERIOD) == (1, 0, 0)
    cfg = load_config_for_files(RECIPE, [], None, two_sets[1])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (load_config(RECIPE).DATASETS.TRAIN, (VAL_NAME,))
    assert cfg.MODEL.DINO.NUM_CLASSES == 2


def test_files_given_later_take_the_place_of_those_before(two_sets: tuple[CocoFiles, CocoFiles]) -> None:
    """As in a notebook that trains twice."""
    for files in two_sets:
        register_datasets(load_config_for_files(RECIPE, [], files, None))
        assert MetadataCatalog.get(TRAIN_NAME).json_file == str(files.annotations)
        assert len(DatasetCatalog.get(TRAIN_NAME)) > 0


def test_without_files_the_config_is_as_it_was() -> None:
    assert load_config_for_files(RECIPE, ["SEED", "3"], None, None) == load_config(RECIPE, ["SEED", "3"])


def test_config_may_repeat_the_classes_of_the_file(two_sets: tuple[CocoFiles, CocoFiles]) -> None:
    same = ["MODEL.DINO.NUM_CLASSES", "2", "MODEL.DINO.CLASS_NAMES", "['red', 'blue']"]
    assert load_config_for_files(RECIPE, same, *two_sets).MODEL.DINO.NUM_CLASSES == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ["MODEL.DINO.NUM_CLASSES", "80"],
            r"NUM_CLASSES is 80 in the config, but 2 .*train.annotations\.json: remove",
        ),  # the default
        (["MODEL.DINO.CLASS_NAMES", "['blue', 'red']"], r"CLASS_NAMES is \['blue', 'red'\].*\['red', 'blue'\]"),
        (["DATASETS.TRAIN", "('x',)"], r"DATASETS\.TRAIN conflicts with the annotation files"),
    ],
)
def test_overrides_that_contradict_the_file_are_refused(
    two_sets: tuple[CocoFiles, CocoFiles], override: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config_for_files(RECIPE, override, *two_sets)


def test_config_file_that_contradicts_the_data_is_refused(
    two_sets: tuple[CocoFiles, CocoFiles], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"_BASE_: {RECIPE}\nMODEL: {{DINO: {{NUM_CLASSES: 80}}}}\n")
    with pytest.raises(ValueError, match="NUM_CLASSES is 80 in the config"):
        load_config_for_files(str(config), [], *two_sets)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1, "name": "red"}, {"id": 2, "name": "green"}], "only one of them has blue, green"),
        ([{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}], "red, blue in the first and blue, red in the second"),
    ],
)
def test_different_categories_of_training_and_validation_are_named(
    two_sets: tuple[CocoFiles, CocoFiles], categories: list[dict], message: str
) -> None:
    set_categories(two_sets[1], categories)
    with pytest.raises(ValueError, match=message):
        load_config_for_files(RECIPE, [], *two_sets)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'no list of objects named "images"'),
        ('{"images": [], "annotations": []}', 'no list of objects named "categories"'),
        ('{"images": [], "annotations": [], "categories": []}', '"categories" is empty'),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', 'needs an integer "id" and a string "name"'),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}]}',
            "several categories have the id 1",
        ),
    ],
)
def test_files_that_are_not_coco_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.json.*{message}"):
        load_config_for_files(RECIPE, [], CocoFiles(tmp_path / "bad.json", tmp_path), None)


def test_missing_files_and_folders_are_named(two_sets: tuple[CocoFiles, CocoFiles], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none\.json does not exist"):
        load_config_for_files(RECIPE, [], CocoFiles(tmp_path / "none.json", tmp_path), None)
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere .* does not exist"):
        load_config_for_files(RECIPE, [], CocoFiles(two_sets[0].annotations, tmp_path / "nowhere"), None)


def without_annotations(files: CocoFiles) -> None:
    content = json.loads(files.annotations.read_text())
    del content["annotations"]
    files.annotations.write_text(json.dumps(content))


def test_images_without_annotations_are_predicted_and_not_trained_on(two_sets: tuple[CocoFiles, CocoFiles]) -> None:
    train, val = two_sets
    without_annotations(val)
    cfg = load_config_for_files(RECIPE, ["MODEL.DEVICE", "cpu"], train, val)
    register_datasets(cfg)
    assert class_names(cfg) == ["red", "blue"]
    cfg.DATALOADER.NUM_WORKERS = 0
    mapper = ImageMapper(cfg, is_train=False, augmentations=[])
    assert [inputs["image_id"] for (inputs,) in build_test_loader(cfg, VAL_NAME, mapper)] == [1, 2]
    with pytest.raises(ValueError, match=rf'{val.annotations} .* no list of objects named "annotations"'):
        load_config_for_files(RECIPE, [], val, None)
    cfg.DATASETS.TRAIN = (VAL_NAME,)
    with pytest.raises(ValueError, match=rf'{val.annotations} of the dataset {VAL_NAME} has no "annotations"'):
        build_train_loader(cfg, mapper)


def test_images_without_annotations_are_evaluated_to_results_alone(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    without_annotations(CocoFiles(*data))
    cfg = named("test_dev", data)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    assert class_names(cfg) == ["red", "blue"]
    assert not DINOTrainer.test(cfg, build_model(cfg))
    results = json.loads((tmp_path / "out/inference/test_dev/coco_instances_results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}
    assert {result["category_id"] for result in results} <= {1, 2}


def named(name: str, data: tuple[Path, Path], *overrides: str) -> CfgNode:
    cfg = load_config(RECIPE, [*config_values(data, Path("unused"), name), *overrides])
    register_datasets(cfg)
    return cfg


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.DINO.NUM_CLASSES", "80"], r"NUM_CLASSES is 80, .*{} has 2 categories \(red, blue\): set it to 2"),
        (
            ["MODEL.DINO.CLASS_NAMES", "['blue', 'red']"],
            r"the dataset {} differ: class 0 is 'blue' in the config and 'red' in the data .* blue, red\..* red, blue",
        ),
        (["MODEL.DINO.CLASS_NAMES", "['red', 'green']"], r"class 1 is 'green' in the config and 'blue' in the data"),
    ],
)
def test_classes_of_the_config_and_of_the_data_are_compared(overrides: list[str], message: str, tmp_path: Path) -> None:
    name = tmp_path.name
    cfg = named(name, write_rectangles(tmp_path / "data", count=1, size=64), *overrides)
    mapper = ImageMapper(cfg, is_train=True, augmentations=[])
    with pytest.raises(ValueError, match=message.format(name)):
        build_test_loader(cfg, name, mapper)
    with pytest.raises(ValueError, match=message.format(name)):
        build_train_loader(cfg, mapper)
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=message.format(name)):
        build_train_loader(cfg, mapper)


def test_classes_of_the_evaluated_set_are_compared_before_training(tmp_path: Path) -> None:
    train, test = (write_rectangles(tmp_path / part, count=1, size=64) for part in ("train", "test"))
    set_categories(CocoFiles(*test), [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}])
    entries = [["compared_train", *map(str, train)], ["compared_test", *map(str, test)]]
    cfg = named("compared_train", train, "DATASETS.COCO_FORMAT", str(entries), "DATASETS.TEST", "['compared_test']")
    cfg.MODEL.DINO.CLASS_NAMES = ["red", "blue"]
    with pytest.raises(ValueError, match="the dataset compared_test differ: class 0 is 'red'"):
        build_train_loader(cfg, ImageMapper(cfg, is_train=True, augmentations=[]))


def test_data_set_without_names_is_left_alone(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    records = list(CocoRecords(str(data[0]), str(data[1]), "nameless_source"))
    DatasetCatalog.register("nameless", lambda: records)
    cfg = named("names", data, "DATASETS.TRAIN", "['nameless']", "DATASETS.TEST", "()", "MODEL.DINO.NUM_CLASSES", "5")
    loader = build_train_loader(cfg, ImageMapper(cfg, is_train=True, augmentations=[]))
    assert len(next(iter(loader))) == 2


def test_detectron2s_own_coco_sets_are_read_without_polygons() -> None:
    cfg = load_config(RECIPE)
    register_datasets(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        registered = DatasetCatalog[name]
        assert registered.func is CocoRecords
        assert registered.args == (MetadataCatalog.get(name).json_file, MetadataCatalog.get(name).image_root, name)
