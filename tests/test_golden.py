"""The published implementations' numbers, through the public path: converted file, DetectionCheckpointer, build_model.

docs/parity.md has the differences that were measured; `python tests/test_golden.py` prints them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from dino_d2 import load_config
from dino_d2.checkpoint.convert import layout_of
from dino_d2.checkpoint.names import SOURCES
from dino_d2.tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402

RECIPES = {  # where it is another than the published one
    "detrex_swin_t": "dino_swint_4scale_12ep",
    "detrex_convnext_t": "dino_convnextt_4scale_12ep",
    "detrex_vitdet_b": "dino_vitdetb_4scale_12ep",
}
MMDET = "mmdet_r50_4scale"  # which differs by design, as tests/golden/README.md says
SAME_PROGRAM = [case for case in recipe.CASES if case != MMDET]
DETECTIONS = 40
WITH_LOSSES = ("r50_4scale", "r50_4scale_dn", "r50_4scale_empty")
WEIGHTS = {"ce": 1.0, "bbox": 5.0, "giou": 2.0}
PER_LAYER = ["MODEL.DINO.SHARE_HEADS", "False"]
VALUES = {  # what a source needs of any recipe
    "official": [],
    "detrex": [*PER_LAYER, "MODEL.DINO.POS_TEMPERATURE", "10000.0", "MODEL.DINO.POS_OFFSET", "-0.5"],
    "mmdet": PER_LAYER,
}


def source_of(model_file: str) -> str:
    return next((source for source in ("detrex", "mmdet") if source in model_file), "official")


def recipe_of(case: str) -> str:
    return str(ROOT / "configs" / f"{RECIPES.get(case, 'dino_r50_4scale_12ep')}.yaml")


def first_name(name: str, source: str) -> str:
    """The name that filled a parameter which the published model stores several times."""
    if source == "mmdet":
        return name
    if source == "detrex":
        return re.sub(r"^(bbox_embed|class_embed)\.", r"transformer.decoder.\1.", name)
    return re.sub(r"^(?:transformer\.decoder\.)?(bbox_embed|class_embed)\.\d+\.", r"transformer.decoder.\1.0.", name)


def write_published(model_file: str, path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint as the authors would have saved it, filled by the recipe."""
    names = json.loads((GOLDEN / f"state_dict_{model_file}.json").read_text())
    source = source_of(model_file)
    state = {n: torch.from_numpy(np.asarray(recipe.fill(first_name(n, source), shape))) for n, shape in names.items()}
    others = {"args": argparse.Namespace(lr=1e-4), "epoch": 11}
    torch.save({"state_dict" if source == "mmdet" else "model": state, **others}, path)
    return state


def config_values(case: str) -> list[str]:
    model_file, changed, *_ = recipe.CASES[case]
    source = source_of(model_file)
    classes = 91 if source == "official" else 80
    values = ["MODEL.DINO.NUM_CLASSES", str(classes), "MODEL.DINO.NUM_QUERIES", str(changed["num_queries"])]
    values += ["TEST.DETECTIONS_PER_IMAGE", str(DETECTIONS), "MODEL.DEVICE", "cpu"]
    if "dn_number" in changed:
        values += ["MODEL.DINO.DN.NUMBER", str(changed["dn_number"])]
        values += ["MODEL.DINO.DN.BOX_NOISE_SCALE", "0.0", "MODEL.DINO.DN.LABEL_NOISE_RATIO", "0.0"]
    elif source == "official":
        values += ["MODEL.DINO.DN.TYPE", "none"]
    return [*values, "MODEL.TIMM.PRETRAINED", "False", *VALUES[source]]


def inputs(case: str, model: nn.Module) -> list[dict]:
    _, _, sizes, counts, seed = recipe.CASES[case]
    classes = 80 if case == MMDET else 91
    result = []
    for i, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        labels, boxes = recipe.targets(seed * 1000 + i, count, classes)
        corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.zeros(count, 4))
        instances.gt_boxes.tensor = torch.from_numpy(corners * [width, height, width, height])  # Boxes rounds
        instances.gt_classes = torch.from_numpy(labels)
        normalised = torch.from_numpy(recipe.image(seed * 100 + i, height, width)).to(model.pixel_mean.dtype)
        result.append({"image": normalised * model.pixel_std + model.pixel_mean, "instances": instances})
    return result


@pytest.fixture(scope="module")
def model_for(tmp_path_factory: pytest.TempPathFactory):
    """case, dtype -> the model, loaded as a user would load it."""
    folder = tmp_path_factory.mktemp("golden")

    def make(case: str, dtype: torch.dtype) -> nn.Module:
        model_file, *_ = recipe.CASES[case]
        published, converted = folder / f"{model_file}.pth", folder / f"{case}.pth"
        if not published.exists():
            write_published(model_file, published)
        if not converted.exists():
            arguments = ["--source", "auto", str(published), str(converted), "--config-file", recipe_of(case)]
            convert_checkpoint.main([*arguments, *config_values(case)])
        model = build_model(load_config(recipe_of(case), config_values(case))).to(dtype)
        DetectionCheckpointer(model).load(str(converted))
        return model.eval()

    return make


def clipped(boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as detectron2 returns them, inside the image; and which of them are left."""
    height, width = size
    boxes = np.stack([boxes[:, i].clip(0, (width, height)[i % 2]) for i in range(4)], axis=1)
    return boxes, (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def detection_differences(case: str, model: nn.Module) -> dict[str, float]:
    golden = np.load(GOLDEN / f"{case}.npz")
    with torch.no_grad():
        results = model(inputs(case, model))
    scores = boxes = labels = 0.0
    for i, (result, size) in enumerate(zip(results, recipe.CASES[case][2], strict=True)):
        found = result["instances"]
        expected, left = clipped(golden[f"det{i}_boxes"], size)
        assert len(found) == left.sum()
        scores = max(scores, float(np.abs(found.scores.numpy() - golden[f"det{i}_scores"][left]).max()))
        boxes = max(boxes, float(np.abs(found.pred_boxes.tensor.numpy() - expected[left]).max()))
        labels += float((found.pred_classes.numpy() != golden[f"det{i}_labels"][left]).sum())
    return {"scores": scores, "boxes (pixels)": boxes, "other classes": labels}


def training_differences(case: str, model: nn.Module) -> dict[str, float]:
    golden = np.load(GOLDEN / f"{case}.npz")
    model.train()
    model.backbone.eval()
    losses = model(inputs(case, model))
    sum(losses.values()).backward()

    def relative(found: float, expected: float) -> float:
        return abs(found - expected) / max(abs(expected), 1e-9)

    worst_loss = 0.0
    for name, value in losses.items():
        theirs, weight = (mmdet_loss(name), 1.0) if case == MMDET else (name, WEIGHTS[name.split("_")[1]])
        worst_loss = max(worst_loss, relative(value.item() / weight, float(golden[f"loss/{theirs}"])))
    parameters = {name: p.grad for name, p in model.named_parameters()}
    names = mmdet_names(model) if case == MMDET else OURS
    worst_gradient = 0.0
    for key in golden.files:
        if key.startswith("gradnorm/"):
            name = names[key.removeprefix("gradnorm/")]
            if name in parameters:  # the label embedding is not there without denoising
                worst_gradient = max(worst_gradient, relative(float(parameters[name].norm()), float(golden[key])))
    total = relative(float(sum(losses.values())), float(golden["loss_total"]))
    return {
        "losses (relative)": worst_loss,
        "total loss (relative)": total,
        "gradient norms (relative)": worst_gradient,
    }


def mmdet_loss(name: str) -> str:
    """MMDetection's name of a loss: `loss_ce_dn_2` is its `d2.dn_loss_cls`."""
    kind, part, layer = re.fullmatch(r"loss_(ce|bbox|giou)((?:_dn|_interm)?)(?:_(\d))?", name).groups()
    kind = {"ce": "cls", "bbox": "bbox", "giou": "iou"}[kind]
    part = {"": "", "_dn": "dn_", "_interm": "enc_"}[part]
    return f"{f'd{layer}.' if layer else ''}{part}loss_{kind}"


def mmdet_names(model: nn.Module) -> dict[str, str]:
    """Our names of MMDetection's parameters."""
    layout = layout_of(model)
    return {theirs: name for name, _ in model.named_parameters() for theirs in SOURCES["mmdet"](name, layout)}


# Parameters of the official code whose gradients the golden files hold.
OURS = {
    "input_proj.0.0.weight": "neck.projections.0.0.weight",
    "transformer.level_embed": "encoder.level_embed",
    "transformer.tgt_embed.weight": "query_selection.content.weight",
    "transformer.encoder.layers.0.self_attn.sampling_offsets.bias": "encoder.layers.0.self_attn.sampling_offsets.bias",
    "transformer.encoder.layers.5.self_attn.value_proj.bias": "encoder.layers.5.self_attn.value_proj.bias",
    "transformer.decoder.layers.0.cross_attn.attention_weights.bias": (
        "decoder.layers.0.cross_attn.attention_weights.bias"
    ),
    "transformer.decoder.layers.5.self_attn.in_proj_bias": "decoder.layers.5.self_attn.in_proj_bias",
    "transformer.decoder.ref_point_head.layers.0.bias": "decoder.query_position.layers.0.bias",
    "transformer.enc_output.bias": "query_selection.proposals.project.bias",
    "transformer.enc_out_bbox_embed.layers.2.weight": "query_selection.proposals.box_head.layers.2.weight",
    "label_enc.weight": "denoising.label_embed.weight",
    "backbone.0.body.layer2.0.conv1.weight": "backbone.res3.0.conv1.weight",
}


@pytest.mark.parametrize("case", SAME_PROGRAM)
def test_detections_in_float64(case: str, model_for) -> None:
    differences = detection_differences(case, model_for(case, torch.float64))
    assert differences["scores"] < 1e-4
    assert differences["boxes (pixels)"] < 0.01
    assert differences["other classes"] == 0


@pytest.mark.parametrize("case", SAME_PROGRAM)
def test_detections_in_float32(case: str, model_for) -> None:
    """Scores and boxes of the same detections; near-equal scores may change places."""
    golden = np.load(GOLDEN / f"{case}.npz")
    model = model_for(case, torch.float32)
    with torch.no_grad():
        results = model(inputs(case, model))
    for i, (result, size) in enumerate(zip(results, recipe.CASES[case][2], strict=True)):
        found = result["instances"]
        expected, left = clipped(golden[f"det{i}_boxes"], size)
        assert np.abs(found.scores.numpy() - golden[f"det{i}_scores"][left]).max() < 1e-3
        distances = np.abs(found.pred_boxes.tensor.numpy()[:, None] - expected[left][None]).max(-1)
        same_class = found.pred_classes.numpy()[:, None] == golden[f"det{i}_labels"][left][None]
        assert np.where(same_class, distances, np.inf).min(1).max() < 0.1


@pytest.mark.parametrize("case", WITH_LOSSES)
def test_losses_and_gradients_in_float64(case: str, model_for) -> None:
    differences = training_differences(case, model_for(case, torch.float64))
    assert differences["losses (relative)"] < 1e-4
    assert differences["total loss (relative)"] < 1e-4
    assert differences["gradient norms (relative)"] < 1e-3


def test_mmdetection_but_for_what_it_does_otherwise(model_for) -> None:
    model = model_for(MMDET, torch.float64)
    differences = detection_differences(MMDET, model)
    assert differences["scores"] < 1e-6
    assert differences["boxes (pixels)"] < 0.5
    assert differences["other classes"] == 0
    differences = training_differences(MMDET, model)
    assert differences["losses (relative)"] < 1e-5
    assert differences["total loss (relative)"] < 1e-5
    assert differences["gradient norms (relative)"] < 1e-4


@pytest.mark.parametrize("model_file", ["DINO_4scale", "detrex_dino_r50"])
def test_published_file_converts_and_official_names_come_back_bit_for_bit(model_file: str, tmp_path: Path) -> None:
    published, ours, back = (str(tmp_path / name) for name in ("published.pth", "ours.pth", "back.pth"))
    state = write_published(model_file, Path(published))
    case = {"DINO_4scale": "r50_4scale_dn", "detrex_dino_r50": "detrex_r50_4scale"}[model_file]
    config = ["--config-file", recipe_of(case), *config_values(case), "MODEL.DINO.NUM_QUERIES", "900"]
    convert_checkpoint.main(["--source", "auto", published, ours, *config])
    convert_checkpoint.main(["--to", "official", ours, back, *config])
    result = torch.load(back, weights_only=True)["model"]
    if model_file == "DINO_4scale":
        assert set(result) == set(state)
        assert all(torch.equal(result[name], state[name]) for name in state)
    else:
        head = "transformer.decoder.class_embed.3.weight"
        assert torch.equal(result[head], state[head])


@pytest.mark.parametrize("case", ["r50_4scale_dn", MMDET])
def test_denoising_groups_are_as_many_and_as_long(case: str, model_for) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    model = model_for(case, torch.float64)
    denoising = model.denoising(model.prepare_targets(inputs(case, model)))
    assert denoising.groups == int(golden["dn_groups"])
    assert len(denoising) == int(golden["dn_pad"])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:

        class Folders:
            @staticmethod
            def mktemp(_: str) -> Path:
                return Path(temporary)

        make = model_for.__wrapped__(Folders)
        for case in recipe.CASES:
            row = detection_differences(case, make(case, torch.float64))
            if case in (*WITH_LOSSES, MMDET):
                row |= training_differences(case, make(case, torch.float64))
            print(case, {key: f"{value:.1e}" for key, value in row.items()})
