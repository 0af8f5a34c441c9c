"""Every class loss with every assignment, in the criterion and in the whole detector."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from dino_d2 import load_config
from dino_d2.autocast import autocast
from dino_d2.checkpoint import to_published
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer, build_optimizer
from dino_d2.modeling import build
from dino_d2.modeling.criterion import LossWeights, SetCriterion
from dino_d2.modeling.matcher import HungarianMatcher
from dino_d2.structures import DenoisingQueries, Pairs, Predictions, Targets
from tests.checkpoint.test_convert import resnet_config
from tests.synthetic import config_values, make_batch, write_rectangles

COMBINATIONS = list(product(build.CLASS_LOSSES, (1, 2), (False, True)))
each_combination = pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=["-".join(map(str, combination)) for combination in COMBINATIONS]
)
Combination = tuple[str, int, bool]


def values_of(combination: Combination) -> list[str]:
    """KEY VALUE …"""
    class_loss, copies, modulated = combination
    return [
        "MODEL.DINO.LOSS.CLASS", class_loss,
        "MODEL.DINO.MATCHER.COPIES", str(copies),
        "MODEL.DINO.MATCHER.POSITION_MODULATED", str(modulated),
    ]  # fmt: skip


@pytest.fixture
def config(tiny_config: Callable) -> Callable[[Combination], CfgNode]:
    def make(combination: Combination) -> CfgNode:
        cfg = tiny_config()
        cfg.merge_from_list(values_of(combination))
        return cfg

    return make


def criterion_of(combination: Combination) -> SetCriterion:
    return build.build_criterion(resnet_config(*values_of(combination)))


# --- the criterion

QUERIES, GROUPS, SLOTS = 12, 2, 4


def make_targets(*counts: int) -> list[Targets]:
    return [Targets(torch.randint(3, (n,)), torch.rand(n, 4).double() * 0.4 + 0.3) for n in counts]


def make_layers(batch: int, denoised: int = 2 * GROUPS * SLOTS) -> tuple[list[Predictions], Predictions]:
    """Two decoder layers, denoising queries first, and the proposals."""
    sizes = (denoised + QUERIES, denoised + QUERIES, QUERIES)
    made = [Predictions(torch.randn(batch, n, 3).double(), torch.rand(batch, n, 4).double() * 0.4 + 0.3) for n in sizes]
    return made[:2], made[2]


def make_denoising(targets: list[Targets]) -> DenoisingQueries:
    """Two groups of four positives and four negatives; the groups of a batch are as long as those of its images."""
    found, first = [], 0
    for i, target in enumerate(targets):
        found += [(i, g * 2 * SLOTS + j, first + j) for g in range(GROUPS) for j in range(min(SLOTS, len(target)))]
        first += len(target)
    pairs = Pairs(*torch.tensor(found, dtype=torch.int64).view(-1, 3).T)
    nothing = torch.zeros(len(targets), 2 * GROUPS * SLOTS, 0)
    return DenoisingQueries(nothing, nothing, 2 * SLOTS, GROUPS, pairs)


def image(i: int, x: Predictions) -> Predictions:
    return Predictions(x.logits[i : i + 1], x.boxes[i : i + 1])


@each_combination
def test_batch_costs_what_its_images_cost(combination: Combination) -> None:
    criterion, counts = criterion_of(combination), (3, 0, 9, 1)
    targets, (layers, proposals) = make_targets(*counts), make_layers(len(counts))
    together = criterion(layers, proposals, make_denoising(targets), targets)
    for name, loss in together.items():
        parts = 0.0
        for i, target in enumerate(targets):
            alone = criterion(
                [image(i, layer) for layer in layers], image(i, proposals), make_denoising([target]), [target]
            )
            parts += alone[name] * max(1, counts[i])
        torch.testing.assert_close(loss * sum(counts), parts, rtol=1e-9, atol=1e-12)


@each_combination
@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (30, 1)], ids=["empty", "one empty", "more objects than queries"])
def test_any_number_of_objects_is_trained_on(combination: Combination, counts: tuple[int, ...]) -> None:
    targets, (layers, proposals) = make_targets(*counts), make_layers(len(counts))
    for layer in (*layers, proposals):
        layer.logits.requires_grad_()
        layer.boxes.requires_grad_()
    losses = criterion_of(combination)(layers, proposals, make_denoising(targets), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all((loss == 0) == (sum(counts) == 0) for name, loss in losses.items() if "loss_ce" not in name)
    for layer in (*layers, proposals):
        assert layer.logits.grad.isfinite().all()
        assert layer.boxes.grad.isfinite().all()


@each_combination
def test_diverged_predictions_are_no_error_and_seen_in_the_losses(combination: Combination) -> None:
    """Where other processes would wait for the one that failed; whoever takes the step sees the loss."""
    targets, (layers, proposals) = make_targets(2, 3), make_layers(2)
    layers[0].logits[0, -1] = torch.nan
    layers[1].boxes[1] = torch.nan
    losses = criterion_of(combination)(layers, proposals, make_denoising(targets), targets)
    assert losses["loss_ce_0"].isnan()
    assert losses["loss_bbox"].isnan()
    assert losses["loss_ce_interm"].isfinite()


@each_combination
def test_denoising_queries_are_never_ranked(combination: Combination) -> None:
    """Though each object has a pair in every group: two equal groups have twice the loss of one."""
    criterion, (target,) = criterion_of(combination), make_targets(3)
    layers, _ = make_layers(1)
    denoising = make_denoising([target])
    half = 2 * SLOTS
    for layer in layers:
        layer.logits[:, half : 2 * half] = layer.logits[:, :half]
        layer.boxes[:, half : 2 * half] = layer.boxes[:, :half]
    twice = criterion(layers, None, denoising, [target])
    first = denoising.pairs.query < half
    once = DenoisingQueries(
        denoising.content[:, :half],
        denoising.anchors[:, :half],
        half,
        1,
        Pairs(*(x[first] for x in (denoising.pairs.image, denoising.pairs.query, denoising.pairs.target))),
    )
    layers = [Predictions(layer.logits[:, half:], layer.boxes[:, half:]) for layer in layers]
    found = criterion(layers, None, once, [target])
    for name, loss in found.items():
        torch.testing.assert_close(loss, twice[name], rtol=1e-9, atol=1e-12)


def test_denoising_queries_have_a_class_weight_of_their_own() -> None:
    targets, (layers, proposals) = make_targets(2, 3), make_layers(2)
    arguments = layers, proposals, make_denoising(targets), targets
    matcher = HungarianMatcher(2, 5, 2)
    plain = SetCriterion(matcher, LossWeights(1, 5, 2))(*arguments)
    weighted = SetCriterion(matcher, LossWeights(2, 5, 2, 3))(*arguments)
    for name, loss in plain.items():
        factor = 1 if "loss_ce" not in name else 3 if "_dn" in name else 2
        torch.testing.assert_close(weighted[name], factor * loss)


def test_box_losses_of_copies_are_weighted() -> None:
    """Two queries on one object, one exact: the other's distance counts exp(-1 / 1.5)."""
    target = Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.3, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]])
    layers = [Predictions(torch.zeros(1, 4, 1), boxes)] * 2
    none = Pairs(*torch.zeros(3, 0, dtype=torch.int64))
    off = DenoisingQueries(torch.zeros(1, 0, 1), torch.zeros(1, 0, 4), 0, 0, none)
    losses = criterion_of(("iou_aware", 2, False))(layers, None, off, [target])
    assert losses["loss_bbox_0"].item() == pytest.approx(5 * 0.1 * 0.513417, rel=1e-5)
    assert losses["loss_bbox"].item() == 0


# --- the detector


@each_combination
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(combination: Combination, dtype: str, config: Callable) -> None:
    model = build_model(config(combination)).train()
    with autocast("cpu", dtype):
        losses = model(make_batch([3, 0, 25]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(
    "values",
    [("iou_aware", 2, False), ("position_supervised", 1, True), ("matchability", 1, False)],
    ids=["align_dino", "stable_dino", "dino_mal"],
)
def test_tiny_model_overfits(values: Combination, config: Callable) -> None:
    """As its paper combines them."""
    cfg = config(values)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.MODEL.BACKBONE.FREEZE_AT = 1e-3, 1.0, 0
    model = build_model(cfg).train()
    optimizer, batch = build_optimizer(cfg, model), make_batch([2, 1])
    totals = []
    for _ in range(60):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        totals.append(losses["loss_ce"].item() + losses["loss_bbox"].item() + losses["loss_giou"].item())
    assert totals[-1] < 0.3 * totals[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rectangles(tmp_path_factory.mktemp("family"), count=4, size=64)


@each_combination
def test_trains_and_resumes(combination: Combination, data: tuple[Path, Path], tmp_path: Path) -> None:
    """Two steps are two steps, whether or not the run was cut off between them."""
    name = f"family_{'_'.join(map(str, combination))}"
    small = ["INPUT.MIN_SIZE_TRAIN", "[64]", "DATASETS.TEST", "()", "SOLVER.STEPS", "()", *values_of(combination)]

    def train(output: Path, steps: int, seed: int = 0, start: int = 0) -> dict[str, torch.Tensor]:
        cfg = load_config("dino_r50_4scale_12ep", [*config_values(data, output, name), *small])
        cfg.SOLVER.MAX_ITER = steps
        if name not in DatasetCatalog:
            register_datasets(cfg)
        torch.manual_seed(seed)  # of the first weights
        trainer = DINOTrainer(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == start
        trainer.train()
        return trainer.model.state_dict()

    train(tmp_path / "resumed", 1)
    resumed, whole = train(tmp_path / "resumed", 2, seed=1, start=1), train(tmp_path / "whole", 2)
    assert all(torch.equal(resumed[key], x) for key, x in whole.items())


@each_combination
def test_weights_have_the_official_names(combination: Combination) -> None:
    plain, model = build_model(resnet_config()), build_model(resnet_config(*values_of(combination)))
    names = set(to_published(plain.state_dict(), "official", plain).state)
    assert set(to_published(model.state_dict(), "official", model).state) == names


# --- keys


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("LOSS.CLASS", "varifocal", "it must be one of focal, iou_aware, position_supervised, matchability"),
        ("LOSS.DN_CLASS_WEIGHT", "half", "it must be a number or None"),
        ("MATCHER.COPIES", "0", "it must be at least 1"),
    ],
)
def test_nonsense_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.DINO\.{key} is '?{value}'?; {message}"):
        build.build_criterion(resnet_config(f"MODEL.DINO.{key}", value))
