"""The example does what its README says: Transformers' model with ideas of DINO, and the same without."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.synthetic import write_rectangles

if sys.version_info < (3, 11):
    pytest.skip("the pinned Transformers wants Python 3.11", allow_module_level=True)

from transformers import DeformableDetrForObjectDetection

from examples.transformers_deformable_detr import train
from examples.transformers_deformable_detr.data import CocoImages, collate, training_batches
from examples.transformers_deformable_detr.dino.structures import DenoisingQueries, Pairs, Predictions, Targets
from examples.transformers_deformable_detr.model import IDEAS, DeformableDetrWithIdeas, Labels, TwoStageDeformableDetr

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "transformers_deformable_detr"
BACKBONE, CLASSES = "mobilenetv2_050", 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random ones, with statistics of batch norms that matter."""
    torch.manual_seed(0)
    backbone = timm.create_model(BACKBONE)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    file = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(backbone.state_dict(), file)
    return file


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    return write_rectangles(tmp_path / "data", count=6, size=96, empty=1)


def with_ideas(*ideas: str) -> DeformableDetrWithIdeas:
    torch.manual_seed(1)
    model = DeformableDetrWithIdeas(train.configuration(BACKBONE, CLASSES), ideas)
    for head in model.bbox_embed:  # they start at zero, where nothing moves
        nn.init.normal_(head.layers[-1].weight, std=0.02)
    for head in model.class_embed:
        nn.init.normal_(head.weight)
    return model


def batch(counts: tuple[int, ...] = (2, 1)) -> dict:
    """The second image is padded."""
    images = [torch.randn(3, 96, 96), torch.randn(3, 64, 80)]
    labels = [
        {"class_labels": torch.randint(CLASSES, (count,)), "boxes": torch.rand(count, 4) * 0.2 + 0.3}
        for count in counts
    ]
    return collate(list(zip(images, labels, strict=True)))


def decoder_inputs(model: DeformableDetrForObjectDetection, **inputs: object) -> dict:
    """What Transformers' decoder is given."""
    seen = {}
    with model.model.decoder.layers[0].register_forward_pre_hook(
        lambda layer, arguments, named: seen.update(content=arguments[0], reference=arguments[2], **named),
        with_kwargs=True,
    ):
        model(**inputs)
    return seen


def test_files_are_those_of_dino_d2() -> None:
    files = sorted((EXAMPLE / "dino").rglob("*.py"))
    names = [file.relative_to(EXAMPLE / "dino") for file in files if file.name != "__init__.py"]
    assert {"denoising", "query_selection", "box_refinement"} <= {name.stem for name in names}
    assert all((EXAMPLE / "dino" / name).samefile(ROOT / "dino_d2" / name) for name in names)


def test_trains_and_evaluates_both_without_detectron2(tmp_path: Path, data: tuple[Path, Path], weights: Path) -> None:
    arguments = ["--train", *map(str, data), "--test", *map(str, data), "--steps", "12", "--size", "96", "--seeds", "3"]
    arguments += ["--batch-size", "2", "--backbone", BACKBONE, "--backbone-weights", str(weights), "--device", "cpu"]
    code = f"""
import sys

sys.modules["detectron2"] = sys.modules["dino_d2"] = None
import dataclasses
import json

import torch

from examples.transformers_deformable_detr.train import main

torch.set_num_threads(1)
runs = main(sys.argv[1:])
open({str(tmp_path / "runs.json")!r}, "w").write(json.dumps([dataclasses.asdict(run) for run in runs]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [(run["seed"], run["ideas"]) for run in runs] == [(3, []), (3, list(IDEAS))]
    for run in runs:
        losses = torch.tensor(run["losses"])
        assert len(losses) == 12
        assert losses.isfinite().all()
        assert losses[-4:].mean() < losses[:4].mean()
        assert 0 <= run["ap"] <= run["ap50"] <= 100
    for name in ("without ", "with cdn, mixed, twice "):
        assert re.search(rf"^{name} *ap50 +[\d.]+   seeds: [\d.]+$", done.stdout, re.M)


def test_without_ideas_the_model_is_transformers() -> None:
    model = with_ideas()
    plain = TwoStageDeformableDetr(model.config)
    plain.load_state_dict(model.state_dict())
    inputs = batch()
    ours, theirs = model(**inputs), plain(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits)
    inside = (theirs.pred_boxes < 0.99).all(-1)  # at the edge the inverse sigmoid is limited to other values
    assert inside.sum() > 50
    torch.testing.assert_close(ours.pred_boxes[inside], theirs.pred_boxes[inside], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=0)


def test_first_stage_of_transformers_is_trained_here() -> None:
    inputs = batch()
    for kind, trained in ((DeformableDetrForObjectDetection, False), (TwoStageDeformableDetr, True)):
        model = kind(train.configuration(BACKBONE, CLASSES))
        model(**inputs).loss.backward()
        assert (model.model.enc_output.weight.grad is not None) == trained, kind


@pytest.mark.parametrize("ideas", [("cdn",), ("cdn", "mixed", "twice")])
def test_matching_queries_do_not_see_denoising_queries(ideas: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = with_ideas(*ideas), batch()
    alone = model(inputs["pixel_values"], inputs["pixel_mask"])
    beside = model(**inputs)
    assert beside.loss_dict["loss_denoising"] > 0
    torch.testing.assert_close(beside.logits, alone.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beside.pred_boxes, alone.pred_boxes, rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(
        DenoisingQueries, "attention_mask", lambda self, count: torch.zeros(2 * [len(self) + count]) > 0
    )
    assert not torch.allclose(model(**inputs).logits, alone.logits, rtol=1e-3, atol=1e-3)


def test_denoising_queries_are_noised_objects_before_the_matching_queries() -> None:
    inputs = batch()
    seen = decoder_inputs(with_ideas("cdn"), **inputs)
    # 20 positives in groups of 2, as many negatives.
    assert seen["content"].shape[1] == 40 + 100
    positives = seen["reference"][0, :40, 0].unflatten(0, (10, 2, 2))[:, 0]
    moved = (positives - inputs["labels"][0]["boxes"]).abs()[..., :2]
    assert ((moved > 0) & (moved <= inputs["labels"][0]["boxes"][:, 2:] / 2 + 1e-4)).all()


def test_batch_without_objects_has_no_denoising() -> None:
    outputs = with_ideas(*IDEAS)(**batch((0, 0)))
    assert outputs.loss.isfinite()
    assert "loss_denoising" not in outputs.loss_dict


def test_known_pairs_are_those_of_the_denoising_queries() -> None:
    """Predictions that are right for them, and background elsewhere, cost nothing."""
    model = with_ideas("cdn")
    labels: Labels = batch((2, 3))["labels"]
    denoising = model.denoising([Targets(label["class_labels"], label["boxes"]) for label in labels])
    logits = torch.full((2, len(denoising), CLASSES), -20.0)
    boxes = torch.full((2, len(denoising), 4), 0.5)
    pairs: Pairs = denoising.pairs
    logits[pairs.class_logits(torch.cat([label["class_labels"] for label in labels]))] = 20.0
    boxes[pairs.image, pairs.query] = torch.cat([label["boxes"] for label in labels])[pairs.target]
    right = model.denoising_loss([Predictions(logits, boxes)], denoising, labels)
    assert right.item() == pytest.approx(0, abs=1e-4)
    wrong = model.denoising_loss([Predictions(logits.flip(1), boxes.flip(1))], denoising, labels)
    assert wrong > 0.1


def test_mixed_selection_gives_learned_content_and_selected_anchors() -> None:
    model, inputs = with_ideas("mixed"), batch()
    seen = decoder_inputs(model, pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
    torch.testing.assert_close(seen["content"], model.selection.content.weight.expand(2, -1, -1))
    first, second = seen["reference"][:, :, 0]
    assert not torch.allclose(first, second)
    loss = model(**inputs).loss_dict["loss_first_stage"]
    for part in (model.selection.proposals.project, model.class_embed[-1], model.bbox_embed[-1].layers[-1]):
        assert torch.autograd.grad(loss, part.weight, retain_graph=True)[0].any()


@pytest.mark.parametrize(("ideas", "reached"), [(("twice",), True), ((), False)])
def test_second_layers_loss_reaches_the_first_box_head_with_look_forward_twice(
    ideas: tuple[str, ...], reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = with_ideas(*ideas), batch()
    layers = []
    predictions = model.predictions
    monkeypatch.setattr(model, "predictions", lambda *given: layers.extend(predictions(*given)) or layers)
    model(**inputs)
    head = model.bbox_embed[0].layers[-1].weight
    (gradient,) = torch.autograd.grad(layers[1].boxes.sum(), head, allow_unused=True, retain_graph=True)
    assert (gradient is not None and bool(gradient.any())) == reached
    (own,) = torch.autograd.grad(layers[0].boxes.sum(), head)
    assert own.any()


def test_models_share_their_first_weights_and_batches(data: tuple[Path, Path], weights: Path) -> None:
    arguments = ["--train", *map(str, data), "--test", *map(str, data)]
    args = train.parse([*arguments, "--backbone", BACKBONE, "--backbone-weights", str(weights), "--device", "cpu"])
    without, ideas = (train.build(chosen, args, CLASSES, seed=5).state_dict() for chosen in args.ideas)
    assert all(torch.equal(tensor, ideas[name]) for name, tensor in without.items())
    first, again = (list(training_batches(CocoImages(*data, 96), 4, 4, seed=5)) for _ in range(2))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])


def test_backbone_is_timms(weights: Path) -> None:
    model = TwoStageDeformableDetr(train.configuration(BACKBONE, CLASSES))
    train.load_backbone(model.model.backbone.model, BACKBONE, weights)
    timms = timm.create_model(BACKBONE, features_only=True, out_indices=(2, 3, 4)).eval()
    timms.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    picture = torch.randn(1, 3, 64, 64)
    ours = model.train().model.backbone(picture, torch.ones(1, 64, 64))
    for (features, _), expected in zip(ours, timms(picture), strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", ["mobilenetv2_100", "resnet18"])
def test_weights_of_another_backbone_are_refused(weights: Path, other: str) -> None:
    model = TwoStageDeformableDetr(train.configuration(other, CLASSES))
    with pytest.raises(
        ValueError, match=rf"backbone.pth has no \S+ of .*, so it is not of timm's {other}: see --backbone"
    ):
        train.load_backbone(model.model.backbone.model, other, weights)


def test_images_and_objects_are_flipped_together(data: tuple[Path, Path]) -> None:
    images = CocoImages(*data, 48)
    (picture, labels), (flipped, mirrored) = images.load(1), images.load(1, flip=True)
    assert picture.shape == (3, 48, 48)
    torch.testing.assert_close(flipped, picture.flip(-1))
    torch.testing.assert_close(
        mirrored["boxes"], labels["boxes"] * torch.tensor([-1.0, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0])
    )
    x, y = (labels["boxes"][-1, :2] * 48).long().tolist()  # the last rectangle covers the others
    red_over_blue = picture[0, y, x] > picture[2, y, x]
    assert bool(red_over_blue) == (labels["class_labels"][-1] == 0)


def test_perfect_detections_have_an_ap_of_100(data: tuple[Path, Path]) -> None:
    images = CocoImages(*data, 96)
    found = []
    for image_id in images.image_ids:
        labels = images.load(image_id)[1]
        for label, (x, y, width, height) in zip(labels["class_labels"], labels["boxes"] * 96, strict=True):
            box = torch.stack([x - width / 2, y - height / 2, width, height]).tolist()
            found.append({"image_id": image_id, "category_id": int(label), "bbox": box, "score": 0.9})
    assert images.evaluate(found) == pytest.approx((100, 100))
    swapped = copy.deepcopy(found)
    for each in swapped:
        each["category_id"] = 1 - each["category_id"]
    assert images.evaluate(swapped)[1] < 50


def test_command_of_the_readme_is_understood() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if " -m examples." in line]
    assert commands
    for words in commands:
        assert words[2] == train.__name__
        train.parse(words[3:])


@pytest.mark.parametrize("ideas", ["", "cdn,thrice", "none,cdn"])
def test_unknown_ideas_are_refused(ideas: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--train", "a", "b", "--test", "a", "b", "--ideas", ideas])
    assert "--ideas" in capsys.readouterr().err
