"""Numbers known by hand, of predictions that are planted; then the whole way through DINOTrainer.test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino_d2 import DINO, load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.evaluation import QueryEvaluator, predictions_per_object
from dino_d2.meta_arch.dino import InferenceSettings
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import Predictions, Queries
from tests.synthetic import config_values, write_rectangles

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml"
HEIGHT, WIDTH = 100, 200
CAT, DOG = 0, 1
CAT_BOX, DOG_BOX = [0.2, 0.2, 0.2, 0.2], [0.7, 0.5, 0.4, 0.6]  # 800 and 4800 pixels
NOWHERE = [0.95, 0.95, 0.02, 0.02]


class PlantedDecoder(nn.Module):
    def forward(self, queries: Queries, planted: list[Predictions]) -> list[Predictions]:
        return planted


class PlantedModel(nn.Module):
    """Says what it is told to: per image id the anchors (Q, 4) and, per layer, Q triples (box, class, score)."""

    postprocess = DINO.postprocess
    inference = InferenceSettings(
        300, 0.0, 1.0, box_voting=False, autocast=None, int8=False, test_time_augmentation=None
    )
    device = torch.device("cpu")

    def __init__(self, plan: dict[int, tuple[list, list[list]]]):
        super().__init__()
        self.plan = plan
        self.decoder = PlantedDecoder()
        self.criterion = SimpleNamespace(matcher=HungarianMatcher(2, 5, 2))
        self.trainable = nn.Parameter(torch.zeros(()))  # DistributedDataParallel takes no model without

    def forward(self, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        plans = [self.plan[x["image_id"]] for x in inputs]
        anchors = torch.tensor([anchors for anchors, _ in plans])
        layers = [planted_predictions(layer) for layer in zip(*(layers for _, layers in plans), strict=True)]
        predictions = self.decoder(Queries(torch.zeros(*anchors.shape[:2], 8), anchors), layers)[-1]
        return self.postprocess(predictions, inputs, [x["image"].shape[-2:] for x in inputs])


def planted_predictions(images: Sequence[list]) -> Predictions:
    logits = torch.full((len(images), len(images[0]), 2), -10.0)
    for i, image in enumerate(images):
        for query, (_, label, score) in enumerate(image):
            logits[i, query, label] = torch.tensor(score).logit()
    return Predictions(logits, torch.tensor([[box for box, _, _ in image] for image in images]))


def moved(box: list[float], *by: float) -> list[float]:
    return [number + move for number, move in zip(box, by, strict=True)]


CATS = [(CAT_BOX, CAT, 0.96), (CAT_BOX, CAT, 0.95), (CAT_BOX, DOG, 0.8), (CAT_BOX, CAT, 0.2)]
NOTHING = [(NOWHERE, CAT, 1e-4)] * 3
PLAN = {
    # A cat that is found twice before the dog is found, taken for a dog once, and found once more.
    1: ([moved(CAT_BOX, 0.1, 0, 0, 0.05), NOWHERE, NOWHERE, NOWHERE], [CATS, CATS]),
    # A dog, at first with IoU 0.31 / 0.49 = 0.63.
    2: (
        [NOWHERE, moved(DOG_BOX, -0.2, 0.1, -0.1, -0.2), NOWHERE, NOWHERE],
        [
            [NOTHING[0], (moved(DOG_BOX, 0.09, 0, 0, 0), DOG, 0.9), *NOTHING[1:]],
            [NOTHING[0], (DOG_BOX, DOG, 0.9), *NOTHING[1:]],
        ],
    ),
    3: ([NOWHERE] * 4, [[*NOTHING, NOTHING[0]]] * 2),
}


def annotation(box: list[float], label: int, iscrowd: int = 0) -> dict[str, Any]:
    cx, cy, w, h = box
    pixels = [(cx - w / 2) * WIDTH, (cy - h / 2) * HEIGHT, w * WIDTH, h * HEIGHT]
    return {"bbox": pixels, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": iscrowd}


def make_input(image_id: int) -> dict[str, Any]:
    """As the loader makes it: the image at half its size."""
    return {"image_id": image_id, "height": HEIGHT, "width": WIDTH, "image": torch.zeros(3, HEIGHT // 2, WIDTH // 2)}


Register = Callable[[dict[int, list[dict]]], str]


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Register]:
    """Register a dataset that is not in COCO's format, with the annotations of each image id."""
    name = f"planted_{tmp_path.name}"

    def make(annotations: dict[int, list[dict]]) -> str:
        dicts = [
            {"file_name": f"{i}.png", "image_id": i, "height": HEIGHT, "width": WIDTH, "annotations": objects}
            for i, objects in annotations.items()
        ]
        DatasetCatalog.register(name, lambda: dicts)
        MetadataCatalog.get(name).thing_classes = ["cat", "dog"]
        COCOEvaluator(name, output_dir=str(tmp_path))  # writes the annotation file
        return name

    yield make
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cat_and_dog(register: Register) -> str:
    crowd = annotation([0.7, 0.7, 0.2, 0.2], CAT, iscrowd=1)
    return register({1: [annotation(CAT_BOX, CAT), crowd], 2: [annotation(DOG_BOX, DOG)], 3: []})


EXPECTED = {
    "ATD100": (0.15 + 0.6) / 2,
    "ATD100s": 0.15,
    "duplicates": 1.0,  # of two objects: both of the best two predictions are the cat
    "AP_layer1": 65.0,  # cats 100; dogs are found at 0.5, 0.55 and 0.6 of ten IoUs
    "AP_layer2": 100.0,
}


def test_planted_numbers_beside_ap(cat_and_dog: str) -> None:
    model = PlantedModel(PLAN)
    evaluators = DatasetEvaluators([COCOEvaluator(cat_and_dog), QueryEvaluator(cat_and_dog, model)])
    batches = [[make_input(1), make_input(2)], [make_input(3)]]
    results = inference_on_dataset(model, batches, evaluators)
    assert results["queries"] == pytest.approx(EXPECTED)
    assert results["bbox"]["AP"] == results["queries"]["AP_layer2"]
    assert not model.decoder._forward_hooks


def run(evaluator: DatasetEvaluator, model: nn.Module, *batches: list[dict]) -> dict:
    evaluator.reset()
    for batch in batches:
        evaluator.process(batch, model(batch))
    return evaluator.evaluate()


def test_evaluating_again_starts_afresh(cat_and_dog: str) -> None:
    model = PlantedModel(PLAN)
    evaluator = QueryEvaluator(cat_and_dog, model, k=1)
    results = [run(evaluator, model, [make_input(i) for i in (1, 2, 3)])["queries"] for _ in range(2)]
    assert results[0] == results[1]
    assert results[0]["ATD1"] == pytest.approx(0.6)


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(
    ("cats", "dog", "duplicates"),
    [
        ((0.9, 0.8), 0.7, 1.0),
        ((0.9, 0.7), 0.8, 0.0),  # the second cat comes third, of two objects
        ((0.9, 0.7), 0.7, 0.5),  # as good as the dog: with it
    ],
)
def test_as_many_predictions_count_as_there_are_objects(
    cats: tuple[float, float], dog: float, duplicates: float, scale: float, cat_and_dog: str
) -> None:
    """In the order of their scores, however low: those of soft class targets are."""
    first = [(CAT_BOX, CAT, scale * score) for score in cats]
    plan = {1: ([NOWHERE] * 2, [first]), 2: ([NOWHERE] * 2, [[(DOG_BOX, DOG, scale * dog), (NOWHERE, DOG, 1e-4)]])}
    model = PlantedModel(plan)
    results = run(QueryEvaluator(cat_and_dog, model), model, [make_input(1), make_input(2)])["queries"]
    assert results["duplicates"] == duplicates


def test_main_process_reports_what_all_have_seen(cat_and_dog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, handed = PlantedModel(PLAN), []

    def gather(data: list) -> list:
        handed.append(data)
        return handed

    monkeypatch.setattr(comm, "gather", gather)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert run(QueryEvaluator(cat_and_dog, model), model, [make_input(2)]) == {}
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    results = run(QueryEvaluator(cat_and_dog, model), model, [make_input(1)], [make_input(3)])
    assert results["queries"] == pytest.approx(EXPECTED)


def test_distributed_model_is_looked_into(cat_and_dog: str, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(PlantedModel(PLAN))
        results = run(QueryEvaluator(cat_and_dog, model), model, [make_input(i) for i in (1, 2, 3)])
    finally:
        torch.distributed.destroy_process_group()
    assert results["queries"] == pytest.approx(EXPECTED)


def test_boxes_without_area_in_the_image_are_no_objects(register: Register) -> None:
    flat, outside = annotation([0.5, 0.5, 0.2, 0.0], CAT), annotation([1.2, 0.5, 0.2, 0.2], CAT)
    name = register({1: [flat], 2: [annotation(DOG_BOX, DOG), outside], 3: []})
    model = PlantedModel(PLAN)
    results = run(QueryEvaluator(name, model), model, [make_input(i) for i in (1, 2, 3)])["queries"]
    assert results["ATD100"] == pytest.approx(0.6)
    assert math.isnan(results["duplicates"])  # the surest prediction is of no object


def test_data_set_without_objects_has_no_numbers(register: Register) -> None:
    model = PlantedModel(PLAN)
    results = run(QueryEvaluator(register({3: []}), model), model, [make_input(3)])["queries"]
    numbers = [results[name] for name in ("ATD100", "ATD100s", "duplicates")]
    assert numbers == pytest.approx([float("nan")] * 3, nan_ok=True)


def test_more_objects_than_queries(register: Register) -> None:
    name = register({2: [annotation(DOG_BOX, DOG)] * 6})
    model = PlantedModel(PLAN)
    results = run(QueryEvaluator(name, model), model, [make_input(2)])["queries"]
    others = (0.25 + 0.45 + 0.38 + 0.58) * 3  # the three other queries are matched as well
    assert results["ATD100"] == pytest.approx((0.6 + others) / 4)


def test_class_that_the_model_does_not_have_is_refused(register: Register) -> None:
    name = register({1: [annotation(CAT_BOX, CAT)]})
    DatasetCatalog.get(name)[0]["annotations"][0]["category_id"] = 2
    model = PlantedModel(PLAN)
    with pytest.raises(ValueError, match=r"Image 1 .* class 2.* 2 classes: MODEL\.DINO\.NUM_CLASSES"):
        run(QueryEvaluator(name, model), model, [make_input(1)])


def test_image_of_another_data_set_is_refused(cat_and_dog: str) -> None:
    model = PlantedModel({4: PLAN[3]})
    with pytest.raises(ValueError, match="Image 4 is not in the dataset"):
        run(QueryEvaluator(cat_and_dog, model), model, [make_input(4)])


def test_image_without_id_is_refused(cat_and_dog: str) -> None:
    del DatasetCatalog.get(cat_and_dog)[1]["image_id"]
    with pytest.raises(ValueError, match=r"2\.png has no image_id"):
        QueryEvaluator(cat_and_dog, PlantedModel(PLAN))


def test_model_without_decoder_is_refused(cat_and_dog: str) -> None:
    with pytest.raises(TypeError, match="Identity has no decoder"):
        QueryEvaluator(cat_and_dog, nn.Identity())


# --- predictions per object


def corners(*boxes: list[float]) -> Boxes:
    return Boxes(torch.tensor(boxes).reshape(-1, 4))


def hits(predicted: Boxes, predicted_classes: list[int], objects: Boxes, classes: list[int]) -> Tensor:
    predictions = Instances((100, 100), pred_boxes=predicted, pred_classes=torch.tensor(predicted_classes).long())
    return predictions_per_object(
        predictions, Instances((100, 100), gt_boxes=objects, gt_classes=torch.tensor(classes).long())
    )


def test_prediction_counts_for_the_object_it_overlaps_most() -> None:
    """The objects overlap by 9 / 11, so every prediction has an IoU above 0.5 with both."""
    objects = corners([0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0])
    predicted = corners([0.0, 0.0, 10.0, 10.0], [0.9, 0.0, 10.9, 10.0], [1.1, 0.0, 11.1, 10.0])
    assert hits(predicted, [0, 0, 0], objects, [0, 0]).tolist() == [1, 2]
    assert hits(predicted, [0, 1, 0], objects, [0, 1]).tolist() == [2, 1]


def test_overlap_below_one_half_is_no_hit() -> None:
    objects = corners([0.0, 0.0, 10.0, 10.0])
    assert hits(corners([0.0, 0.0, 10.0, 5.1], [0.0, 0.0, 10.0, 4.9]), [0, 0], objects, [0]).tolist() == [1]


def test_no_predictions_and_no_objects() -> None:
    box = corners([0.0, 0.0, 10.0, 10.0])
    assert hits(corners(), [], box, [0]).tolist() == [0]
    assert hits(box, [0], corners(), []).tolist() == []


# --- the whole way


def test_trainer_reports_the_numbers_beside_ap(tmp_path: Path) -> None:
    data = write_rectangles(tmp_path / "data", count=3, size=128, empty=1)
    name = f"test_query_metrics_{tmp_path.name}"
    values = config_values(data, tmp_path / "output", name)
    cfg = load_config(str(RECIPE), [*values, "TEST.QUERY_METRICS", "True"])
    register_datasets(cfg)
    model = DINOTrainer.build_model(cfg)
    results = DINOTrainer.test(cfg, model)
    assert list(results) == ["bbox", "queries"]
    assert list(results["queries"]) == ["ATD100", "ATD100s", "duplicates", "AP_layer1", "AP_layer2"]
    assert 0 < results["queries"]["ATD100"] < 4
    assert results["queries"]["AP_layer2"] == pytest.approx(results["bbox"]["AP"], nan_ok=True)
    assert not model.decoder._forward_hooks

    without = DINOTrainer.test(load_config(str(RECIPE), values), model)
    assert list(without) == ["bbox"]
    assert without["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
