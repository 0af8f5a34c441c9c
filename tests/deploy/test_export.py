"""An exported file finds what the model finds."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import Tensor, nn

from dino_d2 import DINO
from dino_d2.deploy import OnnxPredictor
from dino_d2.deploy import export as export_module
from dino_d2.deploy.check import FULL, ROUNDED, ExportError, Tolerance, agreement, check_agreement, example_inputs
from dino_d2.deploy.export import check_exportable, export_onnx, export_program, load_onnx, load_program
from dino_d2.deploy.exportable import ExportableDINO
from dino_d2.deploy.quantize import quantize_file
from dino_d2.deploy.sampling import ms_deform_attn_for_onnx, ms_deform_attn_gather, weighted_rows
from dino_d2.modeling.int8 import QuantizableLinear
from dino_d2.ops import ms_deform_attn_fused, ms_deform_attn_fused_reference

# None of them is what was traced: 2 of 101 x 139.
SHAPES = [(1, 64, 200), (3, 97, 33), (4, 128, 160), (2, 33, 65), (1, 20, 30), (1, 1, 7)]


def photo(height: int, width: int) -> np.ndarray:
    pixels, _, _ = example_inputs(1, height, width, torch.device("cpu"))
    return pixels[0].permute(1, 2, 0).contiguous().numpy()


@pytest.mark.parametrize("numbers", [2, 4])
def test_gathered_sampling_is_deformable_attention(numbers: int) -> None:
    shapes = ((5, 7), (2, 1), (1, 2), (1, 1))  # single rows and columns, too
    value = torch.randn(2, 40, 4, 8)
    reference = torch.rand(2, 9, 4, numbers) * 1.4 - 0.2  # outside, too
    offsets, logits = torch.randn(2, 9, 4, 4, 2, 2) * 3, torch.randn(2, 9, 4, 4, 2)
    arguments = (value, shapes, reference, offsets, logits)
    expected = ms_deform_attn_fused_reference(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
    for op in (ms_deform_attn_gather, ms_deform_attn_for_onnx):
        torch.testing.assert_close(op(*arguments), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lookups_are_a_sound_operator(dtype: torch.dtype) -> None:
    value, shares = torch.randn(2, 6, 4, 8, dtype=dtype), torch.rand(2, 3, 4, 5)
    rows = torch.randint(6, (2, 3, 4, 5), dtype=torch.int32)
    torch.library.opcheck(weighted_rows, (value, rows, shares))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_other_shapes_and_numbers_than_traced(shape: tuple[int, int, int], small_model: DINO, onnx_file: Path) -> None:
    inputs = example_inputs(*shape, torch.device("cpu"))
    run = load_onnx(onnx_file)
    _, scores, _, _ = run(*inputs)
    assert scores.max() - scores.min() > 0.05  # or the comparison would say little
    found = agreement(small_model, run, inputs, FULL)
    assert found.share == 1
    assert found.score_error < 1e-4
    assert found.token_error < 1e-4


@pytest.mark.parametrize("size", [(90, 130), (260, 180), (120, 120), (40, 390)], ids=str)
def test_the_predictor_shows_what_detectron2_shows(
    size: tuple[int, int], small_cfg: CfgNode, small_model: DINO, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photo(*size)
    default = DefaultPredictor(small_cfg)
    default.model = small_model
    expected = default(image)["instances"]
    found = OnnxPredictor(onnx_file)(image)
    assert 0 < len(found) == len(expected)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor, atol=0.05)
    assert found.classes.tolist() == expected.pred_classes.tolist()
    assert found.names == [small_cfg.MODEL.DINO.CLASS_NAMES[i] for i in found.classes]
    monkeypatch.setattr(small_model.inference, "nms_threshold", 1.0)
    assert default(image)["instances"].scores.sum() > found.scores.sum()  # duplicates had been dropped


@pytest.mark.parametrize(("nms_threshold", "box_voting"), [(1.0, False), (0.3, False), (0.3, True)])
def test_duplicates_are_treated_as_by_the_model(
    nms_threshold: float, box_voting: bool, small_model: DINO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_model.inference, "nms_threshold", nms_threshold)
    monkeypatch.setattr(small_model.inference, "box_voting", box_voting)
    pixels, sizes, original = example_inputs(1, 160, 75, torch.device("cpu"))
    height, width = original[0].tolist()
    with torch.no_grad():
        boxes, scores, classes, _ = ExportableDINO(small_model, ms_deform_attn_fused)(pixels, sizes, original)
        (expected,) = small_model([{"image": pixels[0], "height": height, "width": width}])
    expected, kept = expected["instances"], scores[0] > 0
    torch.testing.assert_close(boxes[0][kept], expected.pred_boxes.tensor, rtol=0, atol=1e-2)
    torch.testing.assert_close(scores[0][kept], expected.scores, rtol=0, atol=1e-5)
    assert classes[0][kept].tolist() == expected.pred_classes.tolist()


def test_a_padded_batch(small_model: DINO, onnx_file: Path) -> None:
    predictor = OnnxPredictor(onnx_file)
    images = [photo(120, 90), photo(70, 150)]
    inputs = [torch.from_numpy(array) for array in predictor.prepare(images).values()]
    with torch.no_grad():
        boxes, scores, *_ = ExportableDINO(small_model, ms_deform_attn_fused)(*inputs)
    found = predictor.session.run(["boxes", "scores"], predictor.prepare(images))
    np.testing.assert_allclose(found[0], boxes, atol=0.05)
    np.testing.assert_allclose(found[1], scores, atol=1e-4)
    assert (found[0] <= [[[*image.shape[1::-1]] * 2] for image in images]).all()


def test_images_of_several_sizes_are_found_as_alone(onnx_file: Path) -> None:
    predictor = OnnxPredictor(onnx_file)
    images = [photo(120, 90), photo(70, 150), photo(120, 90)[::-1].copy(), photo(60, 45)]  # three of 160 x 120
    for image, found in zip(images, predictor.predict_batch(images), strict=True):
        alone = predictor(image)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        assert found.image_size == image.shape[:2]


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), 7])
def test_images_of_another_kind_are_refused(image: object, onnx_file: Path) -> None:
    with pytest.raises(ValueError, match=r"an image must be|the image is empty"):
        OnnxPredictor(onnx_file)(image)


def test_no_image_is_refused(onnx_file: Path) -> None:
    with pytest.raises(ValueError, match="no image"):
        OnnxPredictor(onnx_file).predict_batch([])


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_openvino_finds_the_same(
    shape: tuple[int, int, int], small_model: DINO, onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # else importing it reports to its maker
    openvino = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(str(onnx_file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = compiled(dict(zip(export_module.INPUTS, (tensor.numpy() for tensor in inputs), strict=True)))
        return tuple(torch.from_numpy(found[name]) for name in export_module.OUTPUTS)

    found = agreement(small_model, run, example_inputs(*shape, torch.device("cpu")), FULL)
    assert found.share == 1
    assert found.score_error < 1e-4


def test_only_standard_operators(onnx_file: Path) -> None:
    import onnx

    assert {node.domain for node in onnx.load(onnx_file).graph.node} == {""}


def test_threshold_of_the_weights_is_in_the_file(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    assert OnnxPredictor(onnx_file).threshold == 0.41
    model = onnx.load(onnx_file)
    (entry,) = model.metadata_props
    settings = json.loads(entry.value)
    for without in (
        settings | {"score_threshold": None},
        {k: v for k, v in settings.items() if k != "score_threshold"},
    ):
        entry.value = json.dumps(without)  # of weights that have none; of a file of before there was one
        onnx.save(model, tmp_path / "without.onnx")
        assert OnnxPredictor(tmp_path / "without.onnx").threshold == 0.3


def test_a_file_of_another_maker_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"tools/export\.py"):
        OnnxPredictor(tmp_path / "other.onnx")


def test_half_precision_is_near(small_model: DINO) -> None:
    half = ExportableDINO(small_model, ms_deform_attn_gather, half=True)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in small_model.parameters()} == {torch.float32}
    with torch.no_grad():
        check_agreement(small_model, half, ROUNDED)


@pytest.mark.slow
def test_a_file_of_half_precision(small_cfg: CfgNode, small_model: DINO, tmp_path: Path) -> None:
    export_onnx(small_cfg, small_model, tmp_path / "half.onnx", half=True)
    inputs = example_inputs(1, 160, 75, torch.device("cpu"))
    assert agreement(small_model, load_onnx(tmp_path / "half.onnx"), inputs, ROUNDED).within(ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize(("half", "tolerance"), [(False, FULL), (True, ROUNDED)])
def test_programs_for_other_shapes(
    half: bool, tolerance: Tolerance, small_cfg: CfgNode, small_model: DINO, tmp_path: Path
) -> None:
    export_program(small_cfg, small_model, tmp_path / "small.pt2", half)
    inputs = example_inputs(1, 160, 75, torch.device("cpu"))
    assert agreement(small_model, load_program(tmp_path / "small.pt2"), inputs, tolerance).within(tolerance)


def test_a_file_that_differs_is_not_kept(
    small_cfg: CfgNode, small_model: DINO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One whose trace has other weights; the file that was there stays."""
    path = tmp_path / "small.pt2"
    path.write_text("the one before")
    other = ExportableDINO(small_model, ms_deform_attn_fused)
    nn.init.normal_(other.model.decoder.class_heads[0].weight, std=0.5)
    monkeypatch.setattr(export_module, "trace", lambda exportable: exportable)
    monkeypatch.setattr(torch.export, "save", lambda program, file: Path(file).write_text("the one that differs"))
    monkeypatch.setattr(export_module, "load_program", lambda file: torch.no_grad()(other.forward))
    with pytest.raises(ExportError, match="give different detections"):
        export_program(small_cfg, small_model, path, half=False)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("small.pt2", "the one before")]


def test_a_file_that_runs_at_the_traced_size_alone_is_refused(small_model: DINO) -> None:
    def fail(*inputs: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("shape is invalid")

    with pytest.raises(ExportError, match=r"sizes other than those traced .*ThreeConvolutions.*shape is invalid"):
        check_agreement(small_model, fail, FULL)


def test_tokens_that_changed_places_are_forgiven_if_they_score_alike(small_model: DINO) -> None:
    """All tokens do, where the head says the same of each; with other scores the same choice is a fault."""
    alike = copy.deepcopy(small_model)
    nn.init.zeros_(alike.query_selection.proposals.class_head.weight)
    for model, forgiven in ((alike, True), (small_model, False)):
        with_last_first = ExportableDINO(model, ms_deform_attn_fused)
        with_last_first.model.query_selection.proposals.class_head = LastFirst(model.decoder.num_classes)
        inputs = example_inputs(*SHAPES[1], torch.device("cpu"))
        found = agreement(model, with_last_first, inputs, FULL)
        assert found.share == 1  # of what the model finds with these tokens
        assert found.within(FULL) == forgiven
        usual = ExportableDINO(model, ms_deform_attn_fused)(*inputs)
        assert not torch.equal(with_last_first(*inputs)[1], usual[1])


def test_learned_queries_have_no_tokens(tiny_config: Callable[..., CfgNode]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config(QUERY_SELECTION="static")).eval()
    inputs = example_inputs(2, 70, 50, torch.device("cpu"))
    exportable = ExportableDINO(model, ms_deform_attn_fused).requires_grad_(False)
    assert exportable(*inputs)[3].shape == (2, 0)
    assert agreement(model, exportable, inputs, FULL).within(FULL)


class LastFirst(nn.Module):
    """A class head for which the last token is the best one."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, features: Tensor) -> Tensor:
        position = torch.arange(features.shape[1], dtype=features.dtype)
        return position[:, None].expand(*features.shape[:2], self.num_classes)


def test_a_file_that_ignores_padding_is_found_out(small_model: DINO) -> None:
    exportable = ExportableDINO(small_model, ms_deform_attn_fused)

    def without_padding(pixels: Tensor, image_sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        return exportable(pixels, image_sizes.amax(0).expand_as(image_sizes), original_sizes)

    with torch.no_grad(), pytest.raises(ExportError, match="give different detections"):
        check_agreement(small_model, without_padding, FULL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TEST.AUG.ENABLED", True), ("TEST.AMP.ENABLED", True),
        ("MODEL.DINO.QUERY_SCORE_THRESHOLD", 0.1), ("MODEL.PIXEL_MEAN", [0.5]), ("INPUT.FORMAT", "L"),
    ],
)  # fmt: skip
def test_what_a_file_would_not_do_is_refused(key: str, value: object, small_cfg: CfgNode) -> None:
    cfg = small_cfg.clone()
    cfg.merge_from_list([key, value])
    with pytest.raises(ExportError, match=key):
        check_exportable(cfg)


def test_a_file_in_8_bit_integers(
    small_cfg: CfgNode, small_model: DINO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnx

    stages: list[str] = []
    monkeypatch.setattr(export_module.logger, "info", stages.append)
    cfg = small_cfg.clone()
    cfg.TEST.QUANTIZE = "int8"
    model = build_model(cfg).eval()
    model.load_state_dict(small_model.state_dict())
    path = tmp_path / "small.onnx"
    export_module.export_onnx(cfg, model, path, half=False)
    assert stages == ["tracing", "converting to ONNX", "writing", "quantizing", "comparing with PyTorch"]
    nodes = onnx.load(path).graph.node
    layers = [x for x in model.modules() if isinstance(x, QuantizableLinear)]
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == len(layers) > 0
    assert {node.domain for node in nodes} == {""}
    assert OnnxPredictor(path).class_names == tuple(cfg.MODEL.DINO.CLASS_NAMES)

    for shape in SHAPES:  # a shape that the quantizer inferred from the traced one would be refused
        inputs = example_inputs(*shape, torch.device("cpu"))
        found = agreement(small_model, load_onnx(path), inputs, ROUNDED)
        assert found.within(ROUNDED)
        assert 1e-6 < found.score_error < 0.05
    assert all(layer.int8 for layer in layers)  # the model was not changed


def test_a_file_without_known_layers_is_not_quantized(onnx_file: Path, tmp_path: Path) -> None:
    """As of a torch that does not say which modules nodes are of."""
    import onnx

    model = onnx.load(onnx_file)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / "nameless.onnx")
    with pytest.raises(ExportError, match="no product can be quantized"):
        quantize_file(tmp_path / "nameless.onnx")


def test_integers_and_half_precision_are_refused_together(
    small_cfg: CfgNode, small_model: DINO, tmp_path: Path
) -> None:
    cfg = small_cfg.clone()
    cfg.TEST.QUANTIZE = "int8"
    with pytest.raises(ExportError, match=r"TEST\.QUANTIZE int8 and --half"):
        export_module.export_onnx(cfg, small_model, tmp_path / "small.onnx", half=True)
    with pytest.raises(ExportError, match=r"TEST\.QUANTIZE int8 is not supported in torch\.export"):
        export_program(cfg, small_model, tmp_path / "small.pt2", half=False)


def test_tokens_placed_by_strides_are_exported_and_stages_are_said(
    small_cfg: CfgNode, small_model: DINO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(export_module.logger, "info", stages.append)
    model = copy.deepcopy(small_model)
    model.encoder.strides = (16, 32)
    export_module.export_onnx(small_cfg, model, tmp_path / "exact.onnx", half=False)
    assert stages == ["tracing", "converting to ONNX", "writing", "comparing with PyTorch"]
    run, inputs = load_onnx(tmp_path / "exact.onnx"), example_inputs(3, 97, 133, torch.device("cpu"))
    assert agreement(model, run, inputs, FULL).share == 1
    assert agreement(small_model, run, inputs, FULL).share < 1  # it is another model
