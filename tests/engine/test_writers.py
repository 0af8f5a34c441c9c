"""What people watch while a model trains."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from torch import nn

from dino_d2 import load_config
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer, build_optimizer
from dino_d2.engine.writers import ProgressPrinter, WandbWriter, grouped_losses, learning_rates, loss_group
from tests.synthetic import config_values, write_rectangles

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "dino_r50_4scale_12ep.yaml"
LOSSES = {
    "loss_ce": 1.0, "loss_ce_0": 0.5, "loss_ce_10": 0.25, "loss_bbox": 2.0, "loss_giou_1": 3.0,
    "loss_ce_interm": 4.0, "loss_bbox_dn": 5.0, "loss_giou_dn_0": 6.0, "loss_mask_3": 7.0,
}  # fmt: skip


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck = nn.Linear(1, 1), nn.Linear(1, 1)


@pytest.fixture
def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = TwoParts()
    groups = [
        {"params": [p], "lr": 1e-5 if name.startswith("backbone") else 1e-4} for name, p in model.named_parameters()
    ]
    return model, torch.optim.AdamW(groups)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What is printed. Not by caplog: detectron2's loggers stop passing records on once they are set up."""
    printed: list[str] = []
    logger, handler = logging.getLogger("detectron2.utils.events"), logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield printed
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_groups_are_complete_and_add_up() -> None:
    groups = grouped_losses([*LOSSES.items(), ("total_loss", 100.0), ("lr", 1.0)])
    assert groups == {"class": 1.75, "box": 2.0, "giou": 3.0, "encoder": 4.0, "denoising": 11.0, "mask": 7.0}
    assert sum(groups.values()) == sum(LOSSES.values())


def test_every_loss_of_the_model_is_in_a_group(tiny_config) -> None:
    instances = Instances((64, 64), gt_boxes=Boxes([[5.0, 5, 30, 30]]), gt_classes=torch.tensor([0]))
    losses = build_model(tiny_config(DEC_LAYERS=3))([{"image": torch.zeros(3, 64, 64), "instances": instances}])
    assert {loss_group(name) for name in losses} == {"class", "box", "giou", "encoder", "denoising"}


def test_learning_rates_are_those_of_backbone_and_rest(tiny_cfg: CfgNode, parts: tuple) -> None:
    assert learning_rates(*parts) == {"lr_backbone": 1e-5, "lr_rest": 1e-4}
    model = build_model(tiny_cfg)
    rates = learning_rates(model, build_optimizer(tiny_cfg, model))
    assert rates == pytest.approx({"lr_backbone": tiny_cfg.SOLVER.BASE_LR / 10, "lr_rest": tiny_cfg.SOLVER.BASE_LR})


def test_line_has_what_one_watches_and_no_more(parts: tuple, lines: list[str]) -> None:
    printer = ProgressPrinter(100, 16, *parts)
    with EventStorage() as storage:
        for scale in (1, 3):  # means, not latest values
            storage.put_scalars(**{name: scale * loss for name, loss in LOSSES.items()})
            storage.put_scalars(total_loss=scale * sum(LOSSES.values()), grad_norm=scale * 2.5, time=2.0, data_time=0.5)
            storage.step()
        storage.iter = 49
        printer.write()
        recorded = {name: value for name, (value, _) in storage.latest().items()}
    (line,) = lines
    assert line.startswith(
        "iter 50/100 | loss 57.5 = class 3.5 + box 4 + giou 6 + encoder 8 + denoising 22 + mask 14 | "
    )
    assert "grad norm 5 | lr 1e-05 (backbone), 0.0001 (rest) | 2 s/iter (0.5 for data), 8 images/s | " in line
    assert line.endswith("GiB | 0:01:40 left")
    assert "loss_" not in line
    assert (recorded["lr_backbone"], recorded["lr_rest"], recorded["images_per_second"]) == (1e-5, 1e-4, 8)


def test_first_iterations_without_times_have_a_line(parts: tuple, lines: list[str]) -> None:
    with EventStorage() as storage:
        storage.put_scalars(total_loss=3.0)
        ProgressPrinter(100, 16, *parts).write()
    assert lines[0].startswith("iter 1/100 | loss 3 | lr 1e-05")


def test_training_prints_the_line_and_the_files_have_every_loss(tmp_path: Path, lines: list[str]) -> None:
    data = write_rectangles(tmp_path / "data", count=2, size=64)
    values = config_values(data, tmp_path / "run", "watched")
    cfg = load_config(str(RECIPE), [*values, "SOLVER.MAX_ITER", "6", "INPUT.MIN_SIZE_TRAIN", "[64]"])
    register_datasets(cfg)
    trainer = DINOTrainer(cfg)
    trainer.train()
    (line,) = lines
    assert line.startswith("iter 6/6 | loss ")
    scalars = json.loads((tmp_path / "run" / "metrics.json").read_text().splitlines()[0])
    assert {"loss_ce_dn_0", "loss_giou_interm", "loss_bbox", "lr_backbone", "lr_rest", "grad_norm"} <= set(scalars)
    assert list((tmp_path / "run").glob("events.out.tfevents*"))
    kinds = [type(writer) for writer in trainer.build_writers()]
    assert kinds == [ProgressPrinter, JSONWriter, TensorboardXWriter]


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def log(self, scalars: dict, step: int) -> None:
        self.logged.append((step, scalars))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_get_every_scalar_once(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = FakeRun(), {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: given.update(kwargs) or run))
    tiny_cfg.WANDB_PROJECT, tiny_cfg.OUTPUT_DIR = "trees", "output/first"
    writer = WandbWriter(tiny_cfg)
    with EventStorage() as storage:
        storage.put_scalar("total_loss", 3.0)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("lr", 0.1, smoothing_hint=False)
        writer.write()
    writer.close()
    assert run.logged == [(0, {"total_loss": 3.0}), (1, {"lr": 0.1})]
    assert run.finished
    assert (given["project"], given["name"]) == ("trees", "first")
    assert "NUM_QUERIES: 20" in given["config"]["config"]


def test_missing_wandb_is_an_error_that_says_so(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    tiny_cfg.WANDB_PROJECT = "trees"
    with pytest.raises(ImportError, match=r"WANDB_PROJECT is 'trees', but wandb is not installed: pip install wandb"):
        WandbWriter(tiny_cfg)
