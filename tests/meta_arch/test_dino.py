"""The whole detector: images in, losses or Instances out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from dino_d2 import DINO, add_dino_config
from dino_d2.evaluation.recorder import DecoderRecorder
from dino_d2.geometry import xyxy_to_cxcywh
from dino_d2.modeling.build import build_neck
from dino_d2.modeling.deformable_attention import MultiScaleDeformableAttention
from dino_d2.modeling.int8 import QuantizableLinear
from dino_d2.modeling.layers import FeedForward
from dino_d2.structures import Predictions

CONFIGS = Path(__file__).parent.parent.parent / "configs"
VARIANTS = {
    "as published": {},
    "pure": {"QUERY_SELECTION": "pure"},
    "static": {"QUERY_SELECTION": "static"},
    "once": {"LOOK_FORWARD": "once"},
    "once and static": {"LOOK_FORWARD": "once", "QUERY_SELECTION": "static"},
    "dn": {"DN__TYPE": "dn"},
    "no denoising": {"DN__TYPE": "none"},
    "interleaved": {"ENCODER": "interleaved"},
    "a head per layer": {"SHARE_HEADS": False},
    "a head per layer, once": {"SHARE_HEADS": False, "LOOK_FORWARD": "once"},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def make_input(height: int, width: int, objects: int | None = None, **more) -> dict:
    """An image, with so many objects of random classes out of five (None: no annotation at all)."""
    image = {"image": torch.randint(256, (3, height, width), dtype=torch.uint8), **more}
    if objects is not None:
        centre, half = torch.rand(objects, 2) * 0.6 + 0.2, torch.rand(objects, 2) * 0.15 + 0.05
        corners = torch.cat([centre - half, centre + half], dim=-1) * torch.tensor([width, height, width, height])
        image["instances"] = Instances(
            (height, width), gt_boxes=Boxes(corners), gt_classes=torch.randint(5, (objects,))
        )
    return image


def predict(model: nn.Module, *inputs: dict) -> list[Instances]:
    with torch.no_grad():
        return [result["instances"] for result in model.eval()(inputs)]


def assert_same(a: Instances, b: Instances, **tolerance: float) -> None:
    torch.testing.assert_close(a.scores, b.scores, **tolerance)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, **tolerance)
    assert torch.equal(a.pred_classes, b.pred_classes)


def let_boxes_move(model: DINO) -> None:
    """Untrained, every layer leaves the boxes where they are."""
    for head in model.decoder.box_heads:
        nn.init.normal_(head.layers[-1].weight, std=0.1)


def loss_names(*suffixes: str) -> set[str]:
    return {f"{loss}{suffix}" for suffix in suffixes for loss in ("loss_ce", "loss_bbox", "loss_giou")}


def train_step(model: nn.Module, *inputs: dict) -> dict[str, Tensor]:
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    return losses


def assert_every_parameter_is_trained(model: nn.Module) -> None:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trainable.items() if parameter.grad is None] == []
    assert [name for name, parameter in trainable.items() if not parameter.grad.isfinite().all()] == []


# --- training


@each_variant
@pytest.mark.parametrize("objects", [(3, 1), (2, 0), (0, 0)], ids=["objects", "some", "none"])
def test_training_has_finite_losses_and_reaches_every_parameter(
    objects: tuple[int, int], variant: dict, tiny_config
) -> None:
    model = build_model(tiny_config(**variant))
    losses = train_step(model, make_input(64, 96, objects[0]), make_input(80, 64, objects[1]))
    suffixes = ["_0", ""]
    suffixes += [] if variant.get("DN__TYPE") == "none" else ["_dn_0", "_dn"]
    suffixes += [] if variant.get("QUERY_SELECTION") == "static" else ["_interm"]
    assert set(losses) == loss_names(*suffixes)
    assert all(loss.isfinite() for loss in losses.values())
    assert_every_parameter_is_trained(model)


def test_batch_without_objects_has_class_losses_only(tiny_cfg: CfgNode) -> None:
    losses = train_step(build_model(tiny_cfg), make_input(64, 64, 0))
    assert losses["loss_ce"] > 0
    assert all(loss == 0 for name, loss in losses.items() if "loss_ce" not in name)


def test_image_with_150_objects_trains(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg)
    losses = train_step(model, make_input(96, 96, 150), make_input(64, 64, 1))
    assert all(loss.isfinite() for loss in losses.values())
    assert_every_parameter_is_trained(model)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 32), (33, 47), (1, 1333)])
def test_small_and_odd_images_train_and_predict(height: int, width: int, tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg)
    losses = train_step(model, make_input(height, width, 1))
    assert all(loss.isfinite() for loss in losses.values())
    assert_every_parameter_is_trained(model)
    (result,) = predict(model, make_input(height, width))
    assert result.image_size == (height, width)
    assert result.scores.isfinite().all()


@pytest.mark.parametrize("encoder", ["deformable", "interleaved"])
def test_losses_fall_on_a_batch_seen_again_and_again(encoder: str, tiny_config) -> None:
    model = build_model(tiny_config(DN__TYPE="none", ENCODER=encoder))
    inputs = [make_input(64, 64, 2), make_input(64, 64, 1)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = []
    for _ in range(30):
        optimizer.zero_grad()
        history.append(sum(train_step(model, *inputs).values()).item())
        optimizer.step()
    assert history[-1] < 0.8 * history[0]


@each_variant
def test_training_in_bfloat16_has_finite_float32_losses(variant: dict, tiny_config) -> None:
    model = build_model(tiny_config(**variant))
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, make_input(64, 96, 3), make_input(80, 64, 1))
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert_every_parameter_is_trained(model)


def test_losses_in_bfloat16_are_near_those_in_float32(tiny_config) -> None:
    """With learned queries and without noise: a choice of other tokens would change them by jumps."""
    model = build_model(tiny_config(QUERY_SELECTION="static", DN__LABEL_NOISE_RATIO=0.0, DN__BOX_NOISE_SCALE=0.0))
    inputs = [make_input(64, 96, 3), make_input(80, 64, 1)]
    expected = train_step(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, *inputs)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=1e-3)


def test_training_image_without_annotation_is_refused(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).train()
    with pytest.raises(ValueError, match=r'some\.jpg has no "instances"'):
        model([make_input(64, 64, 1), make_input(64, 64, file_name="some.jpg")])


@pytest.mark.parametrize("label", [5, -1])
def test_class_that_the_model_does_not_have_is_refused(label: int, tiny_cfg: CfgNode) -> None:
    image = make_input(64, 64, 2, file_name="some.jpg")
    image["instances"].gt_classes[1] = label
    with pytest.raises(ValueError, match=rf"some\.jpg has classes .*{label}.*MODEL\.DINO\.NUM_CLASSES is 5"):
        build_model(tiny_cfg).train()([image])


@pytest.mark.parametrize("shape", [(1, 64, 64), (4, 64, 64), (64, 64)])
def test_image_without_three_channels_is_refused(shape: tuple[int, ...], tiny_cfg: CfgNode) -> None:
    image = {"image": torch.zeros(shape), "file_name": "some.png"}
    with pytest.raises(ValueError, match=r"some\.png has the shape .* must be \(3, height, width\)"):
        predict(build_model(tiny_cfg), image)


def test_targets_are_relative_centres_and_sizes(tiny_cfg: CfgNode) -> None:
    image = make_input(50, 200, 1)
    image["instances"].gt_boxes = Boxes(torch.tensor([[20.0, 10.0, 60.0, 40.0]]))
    (targets,) = build_model(tiny_cfg).prepare_targets([image])
    torch.testing.assert_close(targets.boxes, torch.tensor([[0.2, 0.5, 0.2, 0.6]]))


# --- evaluation


def test_images_of_one_size_have_no_mask(tiny_cfg: CfgNode) -> None:
    images, mask = build_model(tiny_cfg).preprocess_image([make_input(40, 64), make_input(40, 64)])
    assert images.tensor.shape == (2, 3, 40, 64)
    assert mask is None


@pytest.mark.parametrize("training", [True, False])
def test_images_are_normalised_padded_with_zeros_and_masked(training: bool, tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).train(training)
    inputs = [make_input(40, 64), make_input(64, 48)]
    images, mask = model.preprocess_image(inputs)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (tiny_cfg.MODEL.PIXEL_MEAN, tiny_cfg.MODEL.PIXEL_STD))
    torch.testing.assert_close(images.tensor[0, :, :40], (inputs[0]["image"] - mean) / std)
    for image, image_mask, (height, width) in zip(images.tensor, mask, [(40, 64), (64, 48)], strict=True):
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[:height, :width] = True
        assert torch.equal(~image_mask, inside)
        assert not image[:, ~inside].any()


def test_results_are_the_best_of_all_classes_best_first(tiny_cfg: CfgNode) -> None:
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 30
    model = build_model(tiny_cfg)
    image = make_input(64, 96)
    (result,) = predict(model, image)
    assert len(result) == 30
    assert (result.scores.diff() <= 0).all()
    assert ((result.scores > 0) & (result.scores < 1)).all()
    assert ((result.pred_classes >= 0) & (result.pred_classes < 5)).all()
    model.inference.max_detections = 10**6
    (everything,) = predict(model, image)
    assert len(everything) == 20 * 5
    assert_same(everything[:30], result)


@pytest.mark.parametrize(("threshold", "kept"), [(1.0, [0, 1, 2, 3]), (0.6, [0, 2, 3]), (0.2, [0, 2])])
def test_suppression_drops_what_overlaps_a_better_one_of_its_class(
    threshold: float, kept: list[int], tiny_cfg: CfgNode
) -> None:
    tiny_cfg.MODEL.DINO.NMS_THRESHOLD = threshold
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 4
    model = build_model(tiny_cfg).eval()
    # IoU with the first box: 0.9, 0.9 (of another class), 0.5
    corners = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 0.9, 1], [0, 0, 0.5, 1]])
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=1)
    logits = torch.full((4, 5), -10.0)
    logits[torch.arange(4), torch.tensor([0, 0, 1, 0])] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    (result,) = model.postprocess(Predictions(logits[None], boxes[None]), [{}], [(100, 100)])
    found = result["instances"]
    assert len(found) == 4  # others take the places of those that were dropped
    torch.testing.assert_close(found.pred_boxes.tensor[found.scores > 0.01], corners[kept] * 100)


def with_scores(corners: list[list[float]], of_class_0: list[float]) -> Predictions:
    """One image, with a query for each box; corners in [0, 1]."""
    logits = torch.full((len(corners), 5), -10.0)
    logits[:, 0] = torch.tensor(of_class_0).logit()
    return Predictions(logits[None], xyxy_to_cxcywh(torch.tensor(corners))[None])


def test_duplicates_take_no_places_of_others(tiny_cfg: CfgNode) -> None:
    """They are dropped before the best detections are taken, not after."""
    tiny_cfg.MODEL.DINO.NMS_THRESHOLD = 0.6
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 2
    corners = [[0.0, 0, 0.4, 0.4], [0, 0, 0.4, 0.39], [0, 0, 0.39, 0.4], [0.5, 0.5, 1, 1], [0.6, 0, 1, 0.2]]
    predictions = with_scores(corners, [0.9, 0.8, 0.7, 0.3, 0.2])
    (result,) = build_model(tiny_cfg).eval().postprocess(predictions, [{}], [(100, 100)])
    assert result["instances"].scores.tolist() == pytest.approx([0.9, 0.3])


def test_voting_averages_the_boxes_of_an_object(tiny_cfg: CfgNode) -> None:
    """With squared scores as weights; boxes of other objects and classes have no vote."""
    tiny_cfg.MODEL.DINO.NMS_THRESHOLD, tiny_cfg.MODEL.DINO.BOX_VOTING = 0.6, True
    corners = [[0.0, 0, 0.4, 0.4], [0, 0, 0.3, 0.4], [0, 0, 0.2, 0.4], [0.5, 0.5, 0.5, 0.9]]  # the last is empty
    predictions = with_scores(corners, [0.8, 0.4, 0.4, 0.2])
    predictions.logits[0, :, 1] = torch.tensor([0.1, -10, -10, -10])
    model = build_model(tiny_cfg).eval()
    (result,) = model.postprocess(predictions, [{}], [(100, 100)])
    found = result["instances"]
    right = (0.8**2 * 40 + 0.4**2 * 30) / (0.8**2 + 0.4**2)
    lower = (0.4**2 * 20 + 0.4**2 * 30) / (0.4**2 + 0.4**2)
    of_class_0 = found.pred_boxes.tensor[found.pred_classes == 0]
    torch.testing.assert_close(of_class_0[:2], torch.tensor([[0, 0, right, 40], [0, 0, lower, 40]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        found.pred_boxes.tensor[found.pred_classes == 1][0], torch.tensor([0.0, 0, 40, 40]), atol=1e-3, rtol=0
    )
    assert found.pred_boxes.tensor.isfinite().all()


def test_voting_is_as_exact_in_mixed_precision(tiny_cfg: CfgNode) -> None:
    """detectron2's trainers wrap the model in autocast, whose products of matrices have 8 bits."""
    tiny_cfg.MODEL.DINO.NMS_THRESHOLD, tiny_cfg.MODEL.DINO.BOX_VOTING = 0.6, True
    model = build_model(tiny_cfg).eval()
    predictions = with_scores([[0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.41, 0.4]], [0.8, 0.4])
    (expected,) = model.postprocess(predictions, [{}], [(1000, 1000)])
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model.postprocess(predictions, [{}], [(1000, 1000)])
    assert_same(expected["instances"], found["instances"], rtol=0, atol=1e-3)


def test_voting_is_part_of_dropping_duplicates(tiny_cfg: CfgNode) -> None:
    predictions = with_scores([[0.0, 0, 0.4, 0.4], [0, 0, 0.3, 0.4]], [0.8, 0.4])
    results = []
    for voting in (False, True):
        tiny_cfg.MODEL.DINO.BOX_VOTING = voting
        (result,) = build_model(tiny_cfg).eval().postprocess(predictions, [{}], [(100, 100)])
        results.append(result["instances"])
    assert_same(*results)


def test_boxes_are_absolute_corners_inside_the_image(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg)
    let_boxes_move(model)
    (result,) = predict(model, make_input(64, 96))
    boxes = result.pred_boxes.tensor
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([96.0, 64.0, 96.0, 64.0])).all()
    assert boxes.max() > 1


def test_prediction_is_that_of_its_query_and_class(tiny_cfg: CfgNode) -> None:
    """One query is sure of one class and one box."""
    model = build_model(tiny_cfg)
    logits, boxes = torch.full((1, 20, 5), -5.0), torch.full((1, 20, 4), 0.5)
    logits[0, 7, 3], boxes[0, 7] = 4.0, torch.tensor([0.25, 0.5, 0.5, 0.5])
    predictions = Predictions(logits, boxes)
    ((result,),) = (r.values() for r in model.postprocess(predictions, [make_input(80, 40)], [(80, 40)]))
    assert result.pred_classes[0] == 3
    assert result.scores[0].item() == pytest.approx(torch.tensor(4.0).sigmoid().item())
    torch.testing.assert_close(result.pred_boxes.tensor[0], torch.tensor([0.0, 20.0, 20.0, 60.0]))


def test_results_have_the_wanted_size(tiny_cfg: CfgNode) -> None:
    model, image = build_model(tiny_cfg), make_input(64, 96)
    (plain,) = predict(model, image)
    (scaled,) = predict(model, {**image, "height": 128, "width": 288})
    assert plain.image_size == (64, 96)
    assert scaled.image_size == (128, 288)
    torch.testing.assert_close(scaled.pred_boxes.tensor, plain.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_evaluation_in_mixed_precision(dtype: str, tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.DINO.QUERY_SELECTION = "static"  # the same queries, however tokens are rounded
    plain = build_model(tiny_cfg)
    let_boxes_move(plain)
    tiny_cfg.TEST.AMP.ENABLED, tiny_cfg.TEST.AMP.DTYPE = True, dtype
    mixed = build_model(tiny_cfg)
    mixed.load_state_dict(plain.state_dict())
    products = []
    mixed.encoder.layers[0].ffn.linear1.register_forward_hook(lambda module, inputs, out: products.append(out.dtype))
    image = make_input(64, 96)
    (expected,), (found,) = predict(plain, image), predict(mixed, image)
    assert products == [getattr(torch, dtype)]
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=5e-3)
    assert not torch.equal(found.scores, expected.scores)


def test_evaluation_in_int8(tiny_cfg: CfgNode) -> None:
    tiny_cfg.MODEL.DINO.QUERY_SELECTION = "static"  # the same queries, however tokens are rounded
    plain = build_model(tiny_cfg)
    let_boxes_move(plain)
    tiny_cfg.TEST.QUANTIZE = "int8"
    quantized = build_model(tiny_cfg)
    quantized.load_state_dict(plain.state_dict())
    image = make_input(64, 96)
    (expected,), (found,) = predict(plain, image), predict(quantized, image)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=5e-3)
    assert not torch.equal(found.scores, expected.scores)
    layers = [x for x in quantized.modules() if isinstance(x, QuantizableLinear)]
    attention = [x for x in quantized.modules() if isinstance(x, MultiScaleDeformableAttention)]
    feed_forward = [x for x in quantized.modules() if isinstance(x, FeedForward)]
    assert len(layers) == 4 * len(attention) + 2 * len(feed_forward) > 0
    assert all(layer.int8 for layer in layers)


def test_mixed_precision_around_the_model_reaches_it(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).eval()
    products = []
    model.encoder.layers[0].ffn.linear1.register_forward_hook(lambda module, inputs, out: products.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model([make_input(64, 96)])
    assert products == [torch.bfloat16]


def test_dtype_that_cannot_be_mixed_is_named(tiny_cfg: CfgNode) -> None:
    tiny_cfg.TEST.AMP.ENABLED, tiny_cfg.TEST.AMP.DTYPE = True, "float64"
    with pytest.raises(ValueError, match=r"TEST\.AMP\.DTYPE is 'float64'; it must be one of float16, bfloat16"):
        build_model(tiny_cfg)


# --- batches


def test_neighbour_in_the_batch_does_not_matter(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).double()
    let_boxes_move(model)
    image = make_input(64, 96)
    results = [predict(model, image, make_input(128, 160))[0] for _ in range(2)]
    assert_same(*results, rtol=1e-12, atol=1e-12)


def test_images_of_one_size_are_detected_as_alone(tiny_cfg: CfgNode) -> None:
    model = build_model(tiny_cfg).double()
    let_boxes_move(model)
    images = [make_input(64, 96) for _ in range(3)]
    for image, together in zip(images, predict(model, *images), strict=True):
        assert_same(predict(model, image)[0], together, rtol=1e-9, atol=1e-9)


class Patches(Backbone):
    """Maps whose pixels see their own patch of the image only."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({f"stage{i}": nn.Conv2d(3, 8, 2 ** (i + 1), 2 ** (i + 1)) for i in (2, 3, 4)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: stage(x) for name, stage in self.stages.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=8, stride=stage.stride[0]) for name, stage in self.stages.items()}


@pytest.mark.parametrize("selection", ["mixed", "pure", "static"])
def test_padding_does_not_change_detections(selection: str, tiny_config) -> None:
    """Exact where nothing but the masks can tell padding from image.

    The published architecture itself lets padding in at three places, which are taken out here: convolutions of
    the backbone reach over the border, GroupNorm averages over the padded map, and the query position is that in
    the padded image. Image sizes are multiples of the coarsest stride, so that no token is half padding.
    """
    cfg = tiny_config(QUERY_SELECTION=selection)
    parts = DINO.from_config(cfg)
    parts["backbone"], parts["neck"] = Patches(), build_neck(cfg, [8, 8, 8])
    for level in (*parts["neck"].projections, *parts["neck"].extra_levels):
        level[1] = nn.Identity()
    nn.init.zeros_(parts["decoder"].query_position.layers[-1].weight)
    model = DINO(**parts).double()
    let_boxes_move(model)
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            nn.init.normal_(parameter, std=0.2)
    small, large = make_input(64, 128), make_input(256, 192)
    for image, together in zip((small, large), predict(model, small, large), strict=True):
        assert_same(predict(model, image)[0], together, rtol=1e-9, atol=1e-9)


# --- queries above a score


def with_threshold(config: CfgNode, threshold: float) -> tuple[DINO, DecoderRecorder]:
    """A model whose tokens score anything from 0 to 1, and what its decoder is given."""
    config.MODEL.DINO.QUERY_SCORE_THRESHOLD = threshold
    model = build_model(config).double()
    let_boxes_move(model)
    for head in (model.query_selection.proposals.class_head, *model.decoder.class_heads):
        nn.init.normal_(head.weight, std=0.5)
    recorder = DecoderRecorder(model.decoder)
    recorder.attach()
    return model, recorder


def number_of_queries(recorder: DecoderRecorder) -> int:
    return recorder.pop()[0].content.shape[1]


@pytest.mark.parametrize("nms", [1.0, 0.6])
@pytest.mark.parametrize("selection", ["mixed", "pure"])
def test_images_with_another_number_of_queries_are_detected_as_alone(selection: str, nms: float, tiny_config) -> None:
    cfg = tiny_config(QUERY_SELECTION=selection, NUM_QUERIES=60, NMS_THRESHOLD=nms, BOX_VOTING=nms < 1)
    if nms < 1:
        cfg.TEST.DETECTIONS_PER_IMAGE = 10
    model, recorder = with_threshold(cfg, 0.9)
    images = [make_input(64, 96) for _ in range(4)]
    alone, counts = [], []
    for image in images:
        alone += predict(model, image)
        counts.append(number_of_queries(recorder))
    assert len(set(counts)) > 1
    together = predict(model, *images)
    assert number_of_queries(recorder) == max(counts)
    for expected, found, count in zip(alone, together, counts, strict=True):
        assert len(found) == (5 * count if nms == 1 else min(10, len(expected)))
        assert_same(expected, found, rtol=1e-9, atol=1e-9)


def test_queries_are_those_of_tokens_above_the_threshold(tiny_cfg: CfgNode) -> None:
    model, recorder = with_threshold(tiny_cfg, 0.9)
    images, mask = model.preprocess_image([make_input(64, 96)])
    with torch.no_grad():
        selection = model.eval().query_selection(model.encode(images.tensor, mask))
        model.predict(images.tensor, mask)
    above = selection.proposals.logits.max(-1).values.sigmoid()[0] > 0.9
    queries, _ = recorder.pop()
    assert 1 < above.sum() < 20
    assert torch.equal(queries.anchors, selection.queries.anchors[:, above])
    assert torch.equal(queries.content, selection.queries.content[:, above])


def test_threshold_leaves_one_query_at_least_and_all_at_most(tiny_cfg: CfgNode) -> None:
    model, recorder = with_threshold(tiny_cfg, 0.0)
    image = make_input(64, 96)
    (everything,) = predict(model, image)
    assert number_of_queries(recorder) == 20
    model.inference.query_score_threshold = 1e-9
    assert_same(predict(model, image)[0], everything, rtol=1e-9, atol=1e-9)
    assert number_of_queries(recorder) == 20
    nn.init.constant_(model.query_selection.proposals.class_head.bias, -100)  # all the tokens score next to nothing
    assert len(predict(model, image)[0]) == 5
    assert number_of_queries(recorder) == 1


@pytest.mark.parametrize(
    ("for_queries", "stored", "warned"), [(0.1, 0.05, True), (0.1, 0.2, False), (0.1, None, False)]
)
def test_threshold_above_that_of_the_weights_is_said(
    for_queries: float, stored: float | None, warned: bool, tiny_cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    """0.1 is right for one class loss and too high for another."""
    model, _ = with_threshold(tiny_cfg, for_queries)
    state = model.state_dict()
    state["_extra_state"] = replace(model.assumptions, score_threshold=stored).to_tensor()
    model.load_state_dict(state)
    assert ("QUERY_SCORE_THRESHOLD is 0.1, but" in caplog.text) == warned


def test_training_has_all_queries_whatever_they_score(tiny_config) -> None:
    model, recorder = with_threshold(tiny_config(DN__TYPE="none"), 0.99)
    train_step(model, make_input(64, 96, 2))
    assert number_of_queries(recorder) == 20


@pytest.mark.parametrize(("threshold", "selection"), [(-0.1, "mixed"), (1.0, "mixed"), (0.5, "static")])
def test_threshold_that_cannot_be_is_refused(threshold: float, selection: str, tiny_config) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.DINO\.QUERY_SCORE_THRESHOLD is {threshold}"):
        build_model(tiny_config(QUERY_SCORE_THRESHOLD=threshold, QUERY_SELECTION=selection))


# --- the published recipes


def published(name: str) -> CfgNode:
    cfg = get_cfg()
    add_dino_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    return cfg


@pytest.mark.parametrize(
    ("name", "levels", "millions"),
    [("dino_r50_4scale_12ep", 4, 47), ("dino_r50_5scale_12ep", 5, 47), ("dino_swinl_4scale_12ep", 4, 218)],
)
def test_published_recipe_builds_with_the_published_size_and_predicts(name: str, levels: int, millions: int) -> None:
    model = build_model(published(name))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    assert len(model.encoder.level_embed) == levels
    (result,) = predict(model, make_input(64, 96))
    assert 0 < len(result) <= 300
    assert result.scores.isfinite().all()
