"""One training step: parts of a batch, recomputed activations, losses that are not finite, the average of weights."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from dino_d2 import load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.engine.step import StepSettings, StepTrainer
from tests.synthetic import SameBatch, config_values, make_batch, write_rectangles

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rectangles(tmp_path_factory.mktemp("step"), count=4, size=64)


def config(data: tuple[Path, Path], output: Path, *overrides: str) -> CfgNode:
    values = config_values(data, output, f"step_{output.name}")
    cfg = load_config(str(RECIPE), [*values, "INPUT.MIN_SIZE_TRAIN", "[64]", *overrides])
    register_datasets(cfg)
    return cfg


def gradients(model: nn.Module, batch: list[dict], parts: int) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = StepTrainer(model, SameBatch(batch), optimizer, StepSettings(parts, None, "stop", "."), seed=3)
    trainer.iter = 0
    optimizer.zero_grad()
    trainer._accumulate(batch)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("counts", [[3, 1, 2, 5], [0, 0, 4, 1]], ids=["objects", "parts without any"])
@pytest.mark.parametrize("denoising", ["none", "dn", "cdn"])
def test_gradient_of_parts_is_that_of_the_batch(
    data: tuple[Path, Path], tmp_path: Path, parts: int, counts: list[int], denoising: str
) -> None:
    """Without noise: its numbers are drawn part by part."""
    torch.manual_seed(0)
    noiseless = ("MODEL.DINO.DN.LABEL_NOISE_RATIO", "0.0", "MODEL.DINO.DN.BOX_NOISE_SCALE", "0.0")
    model = build_model(config(data, tmp_path, "MODEL.DINO.DN.TYPE", denoising, *noiseless)).double()
    batch = make_batch(counts)
    whole, accumulated = gradients(model, batch, 1), gradients(model, batch, parts)
    assert whole.keys() == accumulated.keys()
    largest = max(gradient.abs().max() for gradient in whole.values())
    assert max((whole[name] - accumulated[name]).abs().max() for name in whole) <= 1e-9 * largest


def test_batch_that_cannot_be_parted_is_refused(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ACCUMULATION_STEPS is 3; it must divide the 4 images"):
        gradients(build_model(config(data, tmp_path)), make_batch([1, 1, 1, 1]), 3)


@pytest.mark.parametrize("part", ["BACKBONE", "ENCODER", "DECODER"])
def test_recomputing_keeps_less_and_changes_nothing(data: tuple[Path, Path], tmp_path: Path, part: str) -> None:
    kept, results = [], []
    for recompute in ("False", "True"):
        torch.manual_seed(0)
        model = build_model(config(data, tmp_path, f"MODEL.DINO.CHECKPOINT.{part}", recompute))
        batch = make_batch([2, 3])
        sizes = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=sizes: to.append(x.numel()) or x, lambda x: x):
            loss = sum(model(batch).values())
        kept.append(sum(sizes))
        loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert kept[1] < 0.98 * kept[0]
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


def poison(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output * float("nan")


def test_non_finite_loss_is_reported_and_stops(data: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = DINOTrainer(config(data, tmp_path, "SOLVER.MAX_ITER", "2"))
    trainer.model.encoder.layers[0].ffn.register_forward_hook(poison)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="iteration 0 is not finite"):
        trainer.train()
    report = json.loads((tmp_path / "non_finite_0000000_0.json").read_text())
    assert report["first_module"] == "encoder.layers.0.ffn"
    assert report["first_parameter"] is None
    assert report["losses"]["loss_ce"] == "nan"
    assert all(image["file_name"].endswith(".png") for image in report["images"])
    assert len(report["images"]) == trainer.cfg.SOLVER.IMS_PER_BATCH
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


SKIP = ("SOLVER.MAX_ITER", "3", "SOLVER.ON_NON_FINITE", "skip", "DATASETS.TEST", "()")
HALF = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16")


@pytest.mark.parametrize("precision", [(), HALF], ids=["float32", "float16"])
def test_non_finite_loss_can_be_skipped(data: tuple[Path, Path], tmp_path: Path, precision: tuple[str, ...]) -> None:
    trainer = DINOTrainer(config(data, tmp_path, *SKIP, *precision))
    scaler = trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=bool(precision))
    calls = []

    def poison_once(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append(trainer.iter)
        return output * (float("nan") if trainer.iter == 1 else 1)

    trainer.model.encoder.layers[0].ffn.register_forward_hook(poison_once)
    trainer.train()
    assert (tmp_path / "non_finite_0000001_0.json").exists()
    assert calls == [0, 1, 1, 2]  # once more for the report
    assert scaler.get_scale() == (4 if precision else 1)  # the loss says nothing about it
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_non_finite_gradient_of_a_finite_loss_is_reported_and_stops(
    data: tuple[Path, Path], tmp_path: Path, bad: str
) -> None:
    trainer = DINOTrainer(config(data, tmp_path, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"))
    trainer.model.decoder.norm.weight.register_hook(lambda gradient: gradient * float(bad))
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match=r"gradient norm of iteration 0 is not finite.*SOLVER\.BASE_LR"):
        trainer.train()
    report = json.loads((tmp_path / "non_finite_0000000_0.json").read_text())
    assert report["grad_norm"] == bad
    assert math.isfinite(float(report["losses"]["loss_ce"]))
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


def test_non_finite_gradient_can_be_skipped(
    data: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = DINOTrainer(config(data, tmp_path, *SKIP, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"))
    weight = trainer.model.decoder.norm.weight
    weight.register_hook(lambda gradient: gradient * (float("nan") if trainer.iter == 1 else 1))
    logging.getLogger("dino_d2").propagate = True
    trainer.train()
    assert "the gradient norm of iteration 1 is not finite" in caplog.text
    assert not (tmp_path / "non_finite_0000000_0.json").exists()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_float16_step_that_overflows_is_left_out_of_the_gradients_norm(data: tuple[Path, Path], tmp_path: Path) -> None:
    trainer = DINOTrainer(config(data, tmp_path, "SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()", *HALF))
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # the usual 65536 overflows at first
    weight = trainer.model.decoder.norm.weight
    weight.register_hook(lambda gradient: gradient * (float("inf") if trainer.iter == 1 else 1))
    scales, weights = [], []
    step = trainer._trainer.run_step

    def remember() -> None:
        step()
        scales.append(trainer._trainer.grad_scaler.get_scale())
        weights.append(weight.detach().clone())

    trainer._trainer.run_step = remember
    trainer.train()
    norms = trainer.storage.history("grad_norm").values()
    assert [iteration for _, iteration in norms] == [0, 2]
    assert all(math.isfinite(norm) for norm, _ in norms)
    assert scales[1] == scales[0] / 2
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("SOLVER.ACCUMULATION_STEPS", "0", "must be at least 1"),
        ("SOLVER.ON_NON_FINITE", "ignore", "must be stop or skip"),
        ("SOLVER.AMP.DTYPE", "float8", "must be one of float16, bfloat16"),
        ("SOLVER.MAX_ITER", "0", "must be at least 1"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "must be at least 1"),
        ("SOLVER.CHECKPOINT_KEEP", "-1", "must be at least 0"),
        ("SOLVER.EARLY_STOPPING", "-1", "must be at least 0"),
        ("TEST.MAX_DETS_PER_IMAGE", "5", "must be at least 10"),
    ],
)
def test_wrong_setting_is_named(data: tuple[Path, Path], tmp_path: Path, key: str, value: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is .*{complaint}"):
        DINOTrainer(config(data, tmp_path, "SOLVER.AMP.ENABLED", "True", key, value))


def test_average_follows_the_weights_and_is_evaluated_and_saved(data: tuple[Path, Path], tmp_path: Path) -> None:
    ema = ("SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.75", "SOLVER.BASE_LR", "0.01")
    trainer = DINOTrainer(config(data, tmp_path, "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0", *ema))
    history = []
    step = trainer._trainer.run_step

    def remember() -> None:
        step()
        history.append(trainer.model.decoder.norm.weight.detach().clone())

    trainer._trainer.run_step = remember
    trainer.train()
    expected = history[0]
    for weight in history[1:]:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(trainer.ema.model.decoder.norm.weight, expected)
    assert {"bbox", "ema"} <= trainer._last_eval_results.keys()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("ema/bbox/AP" in line and "bbox/AP" in line for line in metrics)
    saved = torch.load(tmp_path / "model_final_ema.pth", weights_only=True)["model"]
    torch.testing.assert_close(saved["decoder.norm.weight"], expected)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]["hooks"]["EMA"]
    torch.testing.assert_close(state["module.decoder.norm.weight"], expected)
