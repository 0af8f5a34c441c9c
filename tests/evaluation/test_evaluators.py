"""Which evaluator a dataset gets, which program computes, and that the numbers are detectron2's."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hotcoco
import numpy as np
import pytest
import torch
from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_lvis_instances, register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.cocoeval import COCOeval

from dino_d2 import load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.evaluation import APSettings, COCOEvaluator, LVISEvaluator, settings
from tests.evaluation.generated import HEIGHT, WIDTH, Generated, detect, generate
from tests.synthetic import config_values, write_rectangles

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml"

Register = Callable[[Generated], str]


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    """Of a dataset that the test registers."""
    yield (name := f"test_v1_{tmp_path.name}")
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def register(name: str, tmp_path: Path) -> Register:
    def register(made: Generated) -> str:
        json_file = tmp_path / "annotations.json"
        json_file.write_text(json.dumps(made.dataset))
        register_coco_instances(name, {}, str(json_file), str(tmp_path))
        DatasetCatalog.get(name)  # loading is what makes the category ids known
        return name

    return register


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that have matched detections, in order."""
    programs: list[str] = []
    theirs, of_pycocotools = hotcoco.COCOeval, COCOeval.evaluate

    def of_hotcoco(*args: object, **keywords: object) -> hotcoco.COCOeval:
        programs.append("hotcoco")
        return theirs(*args, **keywords)

    def evaluate(self: COCOeval) -> None:
        programs.append("pycocotools")
        of_pycocotools(self)

    monkeypatch.setattr(hotcoco, "COCOeval", of_hotcoco)
    monkeypatch.setattr(COCOeval, "evaluate", evaluate)
    return programs


def without_f1(metrics: dict[str, float]) -> dict[str, float]:
    """What detectron2's evaluator gives too."""
    return {name: value for name, value in metrics.items() if name not in ("F1", "score_threshold")}


# --- which program computes


@pytest.mark.parametrize("max_dets", [100, 1000])
@pytest.mark.parametrize("classes", [1, 7])
def test_metrics_are_those_of_detectron2_with_every_backend(
    classes: int, max_dets: int, register: Register, tmp_path: Path, ran: list[str]
) -> None:
    made = generate(20, classes, 12, 120)
    name = register(made)
    theirs = detect(
        evaluation.COCOEvaluator(name, output_dir=str(tmp_path / "theirs"), max_dets_per_image=max_dets), made
    )
    assert len(theirs["bbox"]) == 6 + (classes if classes > 1 else 0)
    for backend, program in (("auto", "hotcoco"), ("hotcoco", "hotcoco"), ("pycocotools", "pycocotools")):
        ran.clear()
        ours = COCOEvaluator(name, APSettings(backend, max_dets), output_dir=str(tmp_path / backend))
        assert without_f1(detect(ours, made)["bbox"]) == theirs["bbox"]
        assert ran == [program]
        files = [tmp_path / folder / "coco_instances_results.json" for folder in ("theirs", backend)]
        assert json.loads(files[0].read_text()) == json.loads(files[1].read_text())


def test_log_says_which_program_computed(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    made = generate(5, 2, 3, 10)
    name = register(made)
    caplog.set_level(logging.INFO)
    detect(COCOEvaluator(name), made)
    assert f"Computing AP of {name} with hotcoco {hotcoco.__version__}" in caplog.text
    detect(COCOEvaluator(name, APSettings("pycocotools")), made)
    assert "with pycocotools 2" in caplog.text
    assert "selected by TEST.COCO_BACKEND" in caplog.text


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("id_of", [int, lambda _: 7, str, lambda n: 2**70 + n, lambda n: -n], ids=range(5))
def test_annotation_ids_do_not_matter(
    id_of: Callable[[int], Any], backend: str, register: Register, tmp_path: Path
) -> None:
    made = generate(5, 2, 3, 10)
    name = register(made)
    expected = detect(COCOEvaluator(name, APSettings(backend)), made)["bbox"]
    for number, annotation in enumerate(made.dataset["annotations"]):
        annotation["id"] = id_of(number)
    (tmp_path / "annotations.json").write_text(json.dumps(made.dataset))
    found = detect(COCOEvaluator(name, APSettings(backend)), made)["bbox"]
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize(
    "lacking",
    [{"area": None, "iscrowd": None}, {"area": float("nan")}, {"area": "1"}, {}],
    ids=["null", "NaN", "text", "missing"],
)
def test_missing_area_is_that_of_the_box_and_without_iscrowd_nothing_is_a_crowd(
    lacking: dict[str, Any], backend: str, register: Register, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = generate(5, 2, 3, 10)
    for annotation in made.dataset["annotations"]:
        annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    name = register(made)
    expected = detect(COCOEvaluator(name, APSettings(backend)), made)["bbox"]
    for annotation in made.dataset["annotations"]:
        del annotation["area"], annotation["iscrowd"]
        annotation |= lacking
    (tmp_path / "annotations.json").write_text(json.dumps(made.dataset))
    caplog.set_level(logging.INFO)
    found = detect(COCOEvaluator(name, APSettings(backend)), made)["bbox"]
    assert found == pytest.approx(expected, nan_ok=True)
    assert f"Annotations of {name} lack area or iscrowd" in caplog.text


@pytest.mark.parametrize("backend", ["auto", "hotcoco"])
def test_pycocotools_computes_what_would_not_be_equal(
    backend: str, register: Register, ran: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = generate(5, 2, 3, 10)
    made.detections[3]["bbox"] = [float("nan")] * 4
    name = register(made)
    theirs = detect(evaluation.COCOEvaluator(name), made)["bbox"]
    ran.clear()
    caplog.set_level(logging.INFO)
    ours = detect(COCOEvaluator(name, APSettings(backend)), made)["bbox"]
    assert without_f1(ours) == pytest.approx(theirs, nan_ok=True)
    assert ran == ["pycocotools"]
    assert "annotations or detections are infinite or NaN" in caplog.text


def test_masks_are_left_to_pycocotools(register: Register, ran: list[str]) -> None:
    made = generate(3, 2, 3, 5)
    for annotation in made.dataset["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    evaluator = COCOEvaluator(register(made))
    evaluator.reset()
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 90.0, 90.0]])))
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([0])
    instances.pred_masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    instances.pred_masks[:, 10:90, 10:90] = True
    image_id = made.dataset["annotations"][0]["image_id"]
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    assert set(evaluator.evaluate()) == {"bbox", "segm"}
    assert ran == ["pycocotools", "pycocotools"]


def test_no_detections_and_no_annotations(name: str, tmp_path: Path, register: Register) -> None:
    made = generate(3, 2, 3, 0)
    assert np.isnan(list(detect(COCOEvaluator(register(made)), made)["bbox"].values())).all()
    json_file = tmp_path / "test_dev.json"
    json_file.write_text(json.dumps({key: made.dataset[key] for key in ("images", "categories")}))
    MetadataCatalog.get(name).__dict__["json_file"] = str(json_file)
    made = generate(3, 2, 3, 5)
    assert detect(COCOEvaluator(name, output_dir=str(tmp_path / "out")), made) == {}
    assert (tmp_path / "out" / "coco_instances_results.json").exists()


def test_class_that_the_data_set_does_not_have_is_refused(register: Register) -> None:
    made = generate(3, 2, 3, 5)
    evaluator = COCOEvaluator(register(made))
    made.dataset["categories"].append({"id": 10**6})
    made.detections[0]["category_id"] = 10**6
    with pytest.raises(ValueError, match=r"class 2, but 'test_v1_\S+' has 2 classes"):
        detect(evaluator, made)


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"TEST\.COCO_BACKEND is 'fast'; it must be one of auto, pycocotools, hotcoco"):
        APSettings("fast")
    with pytest.raises(ValueError, match=r"TEST\.MAX_DETS_PER_IMAGE is 9; it must be at least 10"):
        APSettings(max_dets=9)  # pycocotools would count 10
    APSettings(max_dets=10)
    monkeypatch.setattr(settings, "hotcoco_is_installed", lambda: False)
    with pytest.raises(ImportError, match=r"TEST\.COCO_BACKEND hotcoco needs hotcoco.*pip install"):
        APSettings("hotcoco")
    APSettings("auto")


WITHOUT_HOTCOCO = """
import sys
sys.modules["hotcoco"] = None  # as if it were not installed

import json, logging, pathlib
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
import dino_d2.engine
from dino_d2.evaluation import COCOEvaluator, LVISEvaluator
from tests.evaluation.generated import detect, generate

logging.basicConfig(level=logging.INFO)
made = generate(5, 2, 3, 10)
path = pathlib.Path(sys.argv[1], "annotations.json")
path.write_text(json.dumps(made.dataset))
register_coco_instances("without_hotcoco", {}, str(path), sys.argv[1])
DatasetCatalog.get("without_hotcoco")
print("AP is a number:", detect(COCOEvaluator("without_hotcoco"), made)["bbox"]["AP"] >= 0)
LVISEvaluator("without_hotcoco")
"""


def test_without_hotcoco_pycocotools_computes_and_lvis_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOTCOCO, str(tmp_path)], capture_output=True, text=True, cwd=RECIPE.parents[1]
    )
    assert "AP is a number: True" in done.stdout, done.stderr
    assert "hotcoco (faster) is not installed" in done.stderr
    assert "ImportError: LVIS AP of 'without_hotcoco' needs hotcoco, which is not installed" in done.stderr


def test_evaluator_can_be_copied_and_pickled_after_hotcoco_ran(register: Register) -> None:
    """hotcoco's own objects can be neither."""
    made = generate(5, 2, 3, 10)
    evaluator = COCOEvaluator(register(made))
    expected = json.dumps(detect(evaluator, made))
    for again in (copy.deepcopy(evaluator), pickle.loads(pickle.dumps(evaluator))):
        assert json.dumps(detect(again, made)) == expected


# --- which evaluator a dataset gets


def cfg_for(name: str, output: Path, *overrides: str) -> CfgNode:
    values = config_values((output, output), output, name)
    return load_config(str(RECIPE), [*values, "DATASETS.COCO_FORMAT", "[]", *overrides])


@pytest.mark.parametrize("kind", ["coco", None])
def test_coco_is_the_rule(kind: str | None, register: Register, name: str, tmp_path: Path) -> None:
    register(generate(2, 2, 2, 0))
    if kind is None:
        del MetadataCatalog.get(name).evaluator_type
    assert type(DINOTrainer.build_evaluator(cfg_for(name, tmp_path), name)) is COCOEvaluator


def test_trainer_hands_its_settings_on(register: Register, tmp_path: Path) -> None:
    name = register(generate(2, 2, 2, 0))
    keys = ("TEST.COCO_BACKEND", "pycocotools", "TEST.MAX_DETS_PER_IMAGE", "50")
    evaluator = DINOTrainer.build_evaluator(cfg_for(name, tmp_path, *keys), name)
    assert evaluator._settings == APSettings("pycocotools", 50)
    assert evaluator._max_dets_per_image == [1, 10, 50]


def test_type_without_an_evaluator_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    MetadataCatalog.get(name).evaluator_type = "coco_panoptic_seg"
    with pytest.raises(ValueError, match=rf"'{name}' has evaluator_type 'coco_panoptic_seg'.*override DINOTrainer\."):
        DINOTrainer.build_evaluator(cfg_for(name, tmp_path), name)


def test_every_decoder_layer_is_measured_by_the_same_program(tmp_path: Path, ran: list[str]) -> None:
    data = write_rectangles(tmp_path / "data", count=3, size=128)
    name = f"test_layers_{tmp_path.name}"
    cfg = load_config(str(RECIPE), [*config_values(data, tmp_path / "output", name), "TEST.QUERY_METRICS", "True"])
    register_datasets(cfg)
    model = DINOTrainer.build_model(cfg)
    by_hotcoco = DINOTrainer.test(cfg, model)
    assert ran == ["hotcoco"] * 3  # AP, and that of two layers
    ran.clear()
    cfg.TEST.COCO_BACKEND = "pycocotools"
    by_pycocotools = DINOTrainer.test(cfg, model)
    assert all(
        by_pycocotools[group] == pytest.approx(by_hotcoco[group], rel=0, abs=0, nan_ok=True) for group in by_hotcoco
    )
    assert ran == ["pycocotools"] * 3


# --- LVIS


@pytest.fixture
def lvis_like(name: str, tmp_path: Path) -> Generated:
    """Four images registered with detectron2's function for LVIS; the objects as detections that are sure of them."""
    json_file, _ = write_rectangles(tmp_path / "data", count=4, size=128)
    dataset = json.loads(json_file.read_text())
    for image in dataset["images"]:
        image |= {"coco_url": f"http://localhost/images/{image['file_name']}"}
        image |= {"neg_category_ids": [1, 2], "not_exhaustive_category_ids": []}
    for annotation in dataset["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        del annotation["iscrowd"]
    dataset["categories"] = [{"id": 1, "name": "red", "frequency": "r"}, {"id": 2, "name": "blue", "frequency": "f"}]
    json_file.write_text(json.dumps(dataset))
    register_lvis_instances(name, {}, str(json_file), f"{tmp_path}/data/")
    sure = [
        {key: x[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for x in dataset["annotations"]
    ]
    return Generated(dataset, sure)


def test_lvis_like_data_set_is_trained_on_and_evaluated(name: str, lvis_like: Generated, tmp_path: Path) -> None:
    """The name has v1 in it, so detectron2 gives it LVIS v1's 1203 classes."""
    keys = ("MODEL.DINO.NUM_CLASSES", "1203", "SOLVER.MAX_ITER", "2", "TEST.QUERY_METRICS", "True")
    trainer = DINOTrainer(cfg_for(name, tmp_path / "output", *keys))
    trainer.train()
    results = trainer._last_eval_results
    assert list(results["bbox"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
    assert list(results["queries"]) == ["ATD100", "ATD100s", "duplicates", "AP_layer1", "AP_layer2"]
    assert results["queries"]["AP_layer2"] == results["bbox"]["AP"]


def test_lvis_evaluator_is_hotcoco_even_beside_the_package(
    name: str, lvis_like: Generated, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("lvis")  # with nothing in it: using it would fail
    monkeypatch.setitem(sys.modules, "lvis", package)
    evaluator = DINOTrainer.build_evaluator(cfg_for(name, tmp_path), name)
    assert type(evaluator) is LVISEvaluator
    results = detect(evaluator, lvis_like)["bbox"]
    assert results["AP"] == results["APr"] == results["APf"] == pytest.approx(100)
    assert results["APc"] == -100  # of no class, as detectron2 reports it
    assert ran == ["hotcoco"]
    assert sys.modules["lvis"] is package


def test_detections_of_classes_that_nobody_looked_for_do_not_count(name: str, lvis_like: Generated) -> None:
    wrong = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.99}
    counted = Generated(lvis_like.dataset, [wrong, *lvis_like.detections])
    assert detect(LVISEvaluator(name), counted)["bbox"]["APf"] < 100
    image = lvis_like.dataset["images"][0]
    blue_is_there = any(x["image_id"] == 1 and x["category_id"] == 2 for x in lvis_like.dataset["annotations"])
    image["neg_category_ids"] = []
    image["not_exhaustive_category_ids"] = [2] if blue_is_there else []
    Path(MetadataCatalog.get(name).json_file).write_text(json.dumps(lvis_like.dataset))
    assert detect(LVISEvaluator(name), counted)["bbox"]["APf"] == pytest.approx(100)


@pytest.mark.parametrize(("asked", "counted"), [(100, 300), (1000, 1000)])
def test_lvis_counts_300_detections_or_more(name: str, lvis_like: Generated, asked: int, counted: int) -> None:
    assert LVISEvaluator(name, APSettings(max_dets=asked))._max_dets_per_image == counted


def test_lvis_test_set_without_annotations_writes_its_detections(
    name: str, lvis_like: Generated, tmp_path: Path
) -> None:
    without = {key: lvis_like.dataset[key] for key in ("images", "categories")}
    Path(MetadataCatalog.get(name).json_file).write_text(json.dumps(without))
    assert detect(LVISEvaluator(name, output_dir=str(tmp_path / "out")), lvis_like) == {}
    assert len(json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())) == len(lvis_like.detections)


# --- Pascal VOC

OBJECT = """<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"""


@pytest.fixture
def voc_like(name: str, tmp_path: Path) -> Generated:
    """Four images in Pascal VOC's folders, its ids being names; the objects as sure detections."""
    json_file, images_folder = write_rectangles(tmp_path / "data", count=4, size=128)
    dataset, folder = json.loads(json_file.read_text()), tmp_path / "voc"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    ids = {image["id"]: f"{image['id']:06}" for image in dataset["images"]}
    for image in dataset["images"]:
        image_id = ids[image["id"]]
        Image.open(images_folder / image["file_name"]).save(folder / "JPEGImages" / f"{image_id}.jpg")
        objects = [
            OBJECT.format(name=["red", "blue"][x["category_id"] - 1], x1=left + 1, y1=top + 1, x2=left + w, y2=top + h)
            for x in dataset["annotations"]
            if x["image_id"] == image["id"]
            for left, top, w, h in [x["bbox"]]
        ]
        size = "<size><width>128</width><height>128</height></size>"
        (folder / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
        image["id"] = image_id
    (folder / "ImageSets" / "Main" / "val.txt").write_text("\n".join(ids.values()))
    register_pascal_voc(name, str(folder), "val", 2012, class_names=["red", "blue"])
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"  # as detectron2 does for its own
    sure = [x | {"image_id": ids[x["image_id"]], "score": 0.9} for x in dataset["annotations"]]
    return Generated(dataset, sure)


def test_voc_like_data_set_gets_pascal_vocs_ap(name: str, voc_like: Generated, tmp_path: Path, ran: list[str]) -> None:
    evaluator = DINOTrainer.build_evaluator(cfg_for(name, tmp_path), name)
    assert type(evaluator) is PascalVOCDetectionEvaluator
    assert detect(evaluator, voc_like)["bbox"] == {"AP": 100, "AP50": 100, "AP75": 100}
    assert ran == []


def test_voc_like_data_set_is_trained_on_and_evaluated(
    name: str, voc_like: Generated, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("SOLVER.MAX_ITER", "2", "TEST.QUERY_METRICS", "True")
    trainer = DINOTrainer(cfg_for(name, tmp_path / "output", *keys))
    trainer.train()
    assert list(trainer._last_eval_results["bbox"]) == ["AP", "AP50", "AP75"]
    assert list(trainer._last_eval_results["queries"]) == ["ATD100", "ATD100s", "duplicates"]
    assert "AP per layer needs coco or lvis" in caplog.text
