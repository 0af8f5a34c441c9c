"""Several copies of an image, one result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import DatasetMapperTTA, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dino_d2 import DINO
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.evaluation import QueryEvaluator
from dino_d2.meta_arch import augmented_inference  # the module: pytest would take the class for a test
from tests.synthetic import write_rectangles


def noise(height: int, width: int) -> dict:
    return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8)}


def predict(model: DINO, *inputs: dict) -> list[Instances]:
    with torch.no_grad():
        return [result["instances"] for result in model.eval()(inputs)]


def assert_same(a: Instances, b: Instances, atol: float = 0) -> None:
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=atol)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=atol)
    assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.fixture
def augmented(tiny_cfg: CfgNode) -> Callable[..., DINO]:
    """`augmented(sizes, flip)`: a tiny model that looks at images of their own size, in these copies."""

    def build(sizes: Sequence[int], flip: bool) -> DINO:
        tiny_cfg.INPUT.MIN_SIZE_TEST = 0
        aug = tiny_cfg.TEST.AUG
        aug.ENABLED, aug.MIN_SIZES, aug.FLIP = True, tuple(sizes), flip
        torch.manual_seed(0)
        model = build_model(tiny_cfg)
        for head in model.decoder.box_heads:  # untrained, they leave the boxes where they are
            nn.init.normal_(head.layers[-1].weight, std=0.1)
        return model

    return build


def instances(boxes: Sequence[Sequence[float]], scores: Sequence[float], classes: Sequence[int]) -> Instances:
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def augmentation(
    sizes: Sequence[int], flip: bool, most: int = 100, threshold: float = 0.7, voting: bool = False
) -> augmented_inference.TestTimeAugmentation:
    return augmented_inference.TestTimeAugmentation(DatasetMapperTTA(sizes, 1000, flip), threshold, voting, most)


def find_bright(inputs: Sequence[dict]) -> list[dict]:
    """A detector that never errs: the box around what is bright, in the pixels of the image it is given."""
    (image,) = (x["image"] for x in inputs)
    rows, columns = (image[0] > 127).any(1).nonzero(), (image[0] > 127).any(0).nonzero()
    found = Instances(tuple(image.shape[1:]))
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else []
    found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).view(-1, 4))
    found.scores = torch.full((len(found.pred_boxes),), 1 / image.shape[1])
    found.pred_classes = torch.zeros(len(found.pred_boxes), dtype=torch.int64)
    return [{"instances": found}]


def rectangle(dtype: torch.dtype = torch.uint8) -> Tensor:
    image = torch.zeros(3, 60, 120, dtype=dtype)
    image[:, 10:30, 20:100] = 255
    return image


# --- one result from several copies


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])  # of detectron2's loader, of its DefaultPredictor
def test_what_every_copy_shows_is_found_once_and_where_it_is(dtype: torch.dtype) -> None:
    image = {"image": rectangle(dtype), "height": 120, "width": 360}  # made of an image of twice and three times that
    result = augmentation([30, 60, 150], flip=True)(find_bright, image)["instances"]
    assert result.image_size == (120, 360)
    torch.testing.assert_close(result.pred_boxes.tensor, torch.tensor([[60.0, 20, 300, 60]]), rtol=0, atol=1e-4)
    assert result.scores.tolist() == pytest.approx([1 / 30])  # the one with the highest score of the six


def test_flipped_copy_is_mapped_back() -> None:
    image = rectangle()
    image[:, :, :60] = 0
    copies = []
    augmentation([60], flip=True)(lambda x: copies.append(x[0]["image"]) or find_bright(x), {"image": image})
    assert torch.equal(copies[1], copies[0].flip(-1))
    only_flipped = augmentation([60], flip=True)
    only_flipped.make_copies = lambda x: DatasetMapperTTA([60], 1000, True)(x)[1:]
    result = only_flipped(find_bright, {"image": image})["instances"]
    assert result.pred_boxes.tensor.tolist() == [[60, 10, 100, 30]]


def test_image_without_detections_has_none() -> None:
    result = augmentation([30, 60], flip=True)(find_bright, {"image": torch.zeros(3, 40, 50)})["instances"]
    assert len(result) == 0
    assert result.image_size == (40, 50)


def test_model_in_float64(augmented: Callable) -> None:
    model, image = augmented([64, 96], flip=True), noise(70, 90)
    (found,) = predict(model.double(), image)
    assert found.scores.dtype == torch.float64
    assert len(found) > 0


def test_merging_drops_what_overlaps_a_surer_one_of_its_class() -> None:
    first = instances([[0, 0, 50, 50], [50, 50, 90, 90]], [0.5, 0.4], [0, 0])
    second = instances([[0, 0, 50, 48], [0, 0, 50, 49], [0, 0, 50, 30]], [0.9, 0.3, 0.2], [0, 1, 0])
    merged = augmentation([1], False).merge([first, second])
    assert merged.scores.tolist() == pytest.approx([0.9, 0.4, 0.3, 0.2])
    assert merged.pred_classes.tolist() == [0, 0, 1, 0]
    assert merged.pred_boxes.tensor[0].tolist() == [0, 0, 50, 48]
    assert len(augmentation([1], False, threshold=0.5).merge([first, second])) == 3


def test_boxes_of_an_object_in_several_copies_are_averaged_if_the_model_does() -> None:
    nothing = instances([], [], [])
    copies = [instances([[10, 10, 30, 30]], [0.6], [0]), instances([[12, 10, 32, 30]], [0.3], [0]), nothing]
    kept = augmentation([60], flip=True).merge(copies)
    assert kept.pred_boxes.tensor.tolist() == [[10, 10, 30, 30]]
    averaged = augmentation([60], flip=True, voting=True).merge(copies)
    weights = 0.36 / (0.36 + 0.09), 0.09 / (0.36 + 0.09)  # squared scores
    left = 10 * weights[0] + 12 * weights[1]
    torch.testing.assert_close(averaged.pred_boxes.tensor, torch.tensor([[left, 10, left + 20, 30]]))
    assert averaged.scores.tolist() == pytest.approx([(0.6 + (0.6 + 0.3 + 0) / 3) / 2])
    assert len(augmentation([60], flip=True, voting=True).merge([nothing, nothing])) == 0


def test_what_all_copies_show_comes_before_what_one_shows_if_the_model_averages() -> None:
    seen_twice, seen_once = [10, 10, 30, 30], [60, 60, 90, 90]
    other_class = [10, 10, 30, 30]
    copies = [instances([seen_twice, seen_once], [0.6, 0.7], [0, 0]),
              instances([seen_twice, other_class], [0.6, 0.5], [0, 1])]  # fmt: skip
    plain = augmentation([60], flip=True).merge(copies)
    assert plain.pred_boxes.tensor.tolist() == [seen_once, seen_twice, other_class]
    averaged = augmentation([60], flip=True, voting=True).merge(copies)
    assert averaged.pred_boxes.tensor.tolist() == [seen_twice, seen_once, other_class]
    assert averaged.scores.tolist() == pytest.approx([0.6, (0.7 + 0.35) / 2, (0.5 + 0.25) / 2])


@pytest.mark.parametrize(
    ("of_model", "voting", "expected"),
    [(0.6, True, (0.6, True)), (0.9, True, (0.7, True)), (1.0, True, (0.7, False)), (0.6, False, (0.6, False))],
)
def test_copies_are_merged_as_the_model_drops_duplicates(
    of_model: float, voting: bool, expected: tuple[float, bool], augmented: Callable[..., DINO], tiny_cfg: CfgNode
) -> None:
    tiny_cfg.MODEL.DINO.NMS_THRESHOLD, tiny_cfg.MODEL.DINO.BOX_VOTING = of_model, voting
    settings = augmented([60], flip=True).inference.test_time_augmentation
    assert (settings.nms_threshold, settings.box_voting) == expected


@pytest.mark.parametrize(("flips_in_training", "flip"), [("horizontal", True), ("none", False), ("vertical", False)])
def test_copies_around_the_test_size_are_flipped_if_training_flips(
    flips_in_training: str, flip: bool, tiny_cfg: CfgNode
) -> None:
    tiny_cfg.INPUT.RANDOM_FLIP = flips_in_training
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 100, 150
    keys = augmented_inference.augmentation_keys(tiny_cfg)
    tiny_cfg.merge_from_list([part for item in keys.items() for part in item])
    make_copies = augmented_inference.build_test_time_augmentation(tiny_cfg).make_copies
    image = noise(50, 60) | {"height": 50, "width": 60}
    shapes = [tuple(copy["image"].shape[1:]) for copy in make_copies(image)]
    assert shapes == [shape for shape in ((90, 108), (100, 120), (110, 132)) for _ in range(1 + flip)]
    wide = noise(50, 100) | {"height": 50, "width": 100}
    assert max(copy["image"].shape[2] for copy in make_copies(wide)) == 165  # 1.1 times the longest


def test_merged_result_has_no_more_than_the_most_and_these_are_the_best() -> None:
    copies = [instances([[10 * i, 0, 10 * i + 9, y]], [0.1 * i], [0]) for i, y in enumerate([9, 9, 9, 9])]
    merged = augmentation([1], False, most=2).merge(copies)
    assert merged.scores.tolist() == pytest.approx([0.3, 0.2])


def test_no_sizes_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES is empty"):
        augmentation([], flip=True)


# --- DINO


def test_one_copy_is_the_plain_result(augmented: Callable[..., DINO]) -> None:
    model = augmented([64], flip=False)
    image = {**noise(64, 96), "height": 128, "width": 288}
    (result,) = predict(model, image)
    model.inference.test_time_augmentation = None
    assert_same(result, predict(model, image)[0])


def test_flipped_image_has_the_flipped_result(augmented: Callable[..., DINO]) -> None:
    model = augmented([64], flip=True)
    image = noise(64, 96)
    (result,) = predict(model, image)
    (flipped,) = predict(model, {"image": image["image"].flip(-1)})
    left, top, right, bottom = flipped.pred_boxes.tensor.unbind(1)
    flipped.pred_boxes = Boxes(torch.stack([96 - right, top, 96 - left, bottom], dim=1))
    model.inference.test_time_augmentation = None
    assert not torch.equal(result.scores, predict(model, image)[0].scores)
    assert_same(result, flipped, atol=1e-4)


def test_copies_do_not_concern_training(augmented: Callable[..., DINO]) -> None:
    boxes, classes = Boxes(torch.tensor([[10.0, 10, 50, 40]])), torch.tensor([3])
    image = {**noise(64, 96), "instances": Instances((64, 96), gt_boxes=boxes, gt_classes=classes)}
    losses = augmented([64, 96], flip=True).train()([image])
    assert {"loss_ce", "loss_bbox", "loss_giou"} <= set(losses)


def test_every_image_of_a_batch_has_its_result(augmented: Callable[..., DINO]) -> None:
    model = augmented([48, 64], flip=True)
    images = [noise(64, 96), noise(80, 70)]
    for image, result in zip(images, predict(model, *images), strict=True):
        assert_same(result, predict(model, image)[0])
        assert len(result) <= model.inference.max_detections


def test_default_predictor_uses_it(augmented: Callable[..., DINO], tiny_cfg: CfgNode, tmp_path: Path) -> None:
    model = augmented([48, 64], flip=True)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    photo = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    result = DefaultPredictor(tiny_cfg)(photo)["instances"]
    channels = photo if tiny_cfg.INPUT.FORMAT == "BGR" else photo[:, :, ::-1]
    image = {"image": torch.from_numpy(channels.transpose(2, 0, 1).copy())}
    assert_same(result, predict(model, image)[0])


def test_evaluation_uses_it(augmented: Callable[..., DINO], tiny_cfg: CfgNode, tmp_path: Path) -> None:
    annotations, images = write_rectangles(tmp_path / "data", count=2, size=64)
    tiny_cfg.DATASETS.COCO_FORMAT = [["tta_rectangles", str(annotations), str(images)]]
    tiny_cfg.DATASETS.TEST, tiny_cfg.DATALOADER.NUM_WORKERS = ("tta_rectangles",), 0
    tiny_cfg.MODEL.DINO.NUM_CLASSES, tiny_cfg.OUTPUT_DIR = 2, str(tmp_path)
    register_datasets(tiny_cfg)
    model = augmented([48, 64], flip=True)
    passes = []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    assert "AP" in DINOTrainer.test(tiny_cfg, model)["bbox"]
    assert len(passes) == 2 * 4
    with pytest.raises(ValueError, match=r"TEST\.QUERY_METRICS .* TEST\.AUG\.ENABLED"):
        QueryEvaluator("tta_rectangles", model)


def test_measuring_queries_of_several_passes_is_refused_before_training(tiny_cfg: CfgNode) -> None:
    tiny_cfg.TEST.AUG.ENABLED = tiny_cfg.TEST.QUERY_METRICS = True
    with pytest.raises(ValueError, match=r"TEST\.QUERY_METRICS .* TEST\.AUG\.ENABLED"):
        build_model(tiny_cfg)


def test_images_resized_twice_are_warned_about(tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    tiny_cfg.TEST.AUG.ENABLED = True
    with caplog.at_level(logging.WARNING, logger="dino_d2"):
        build_model(tiny_cfg)
    assert "INPUT.MIN_SIZE_TEST 800" in caplog.text
