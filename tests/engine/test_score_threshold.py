"""The score threshold of an evaluation lies in the checkpoints of the weights that were evaluated, and in no other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_d2 import Detector, load_config
from dino_d2.checkpoint.assumptions import EXTRA_STATE, Assumptions
from dino_d2.checkpoint.files import average_of
from dino_d2.data import register_datasets
from dino_d2.engine import DINOTrainer
from dino_d2.engine.score_threshold import found_threshold
from tests.synthetic import config_values, write_rectangles

RECIPE = "dino_r50_4scale_12ep"
STEPS = 6
EMA = ("SOLVER.EMA.ENABLED", True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_rectangles(tmp_path_factory.mktemp("score_threshold"), count=2, size=64)


def found(ap: float, threshold: float) -> dict[str, dict[str, float]]:
    return {"bbox": {"AP": ap, "F1": 50.0, "score_threshold": threshold}}


@pytest.fixture
def planned(data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Train for six steps, or go on; evaluated every second one, whose results are planned."""

    def train(plan: dict[int, dict[str, Any]], *overrides: object) -> DINOTrainer:
        def evaluate(trainer: DINOTrainer) -> dict:
            trainer._last_eval_results = plan[min(trainer.iter + 1, trainer.max_iter)]
            return trainer._last_eval_results

        monkeypatch.setattr(DINOTrainer, "evaluate", evaluate)
        settings = ("SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "(48,)")
        settings += ("SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "SOLVER.BEST_METRIC", "bbox/AP")
        values = [*config_values(data, tmp_path, f"threshold_{tmp_path.name}"), *map(str, (*settings, *overrides))]
        cfg = load_config(RECIPE, values)
        register_datasets(cfg)
        trainer = DINOTrainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        return trainer

    return train


def threshold_in(state: dict[str, Tensor]) -> float | None:
    return Assumptions.from_tensor(state[EXTRA_STATE]).score_threshold


def stored(path: Path) -> float | None:
    return threshold_in(torch.load(path, weights_only=True)["model"])


def test_each_file_has_the_threshold_of_its_own_evaluation(planned: Any, tmp_path: Path) -> None:
    plan = {
        2: found(10.0, 0.12) | {"ema": found(10.0, 0.22)},
        4: found(30.0, 0.14) | {"ema": found(20.0, 0.24)},
        6: found(20.0, 0.16) | {"ema": found(30.0, 0.26)},
    }
    trainer = planned(plan, *EMA)
    assert stored(tmp_path / "model_final.pth") == 0.16
    assert stored(tmp_path / "model_final_ema.pth") == 0.26
    assert stored(tmp_path / "model_best.pth") == 0.14
    assert threshold_in(average_of(tmp_path / "model_final.pth")) == 0.26
    for before_evaluation in ("model_0000001.pth", "model_0000003.pth"):  # not that of the evaluation before
        assert stored(tmp_path / before_evaluation) is None
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final.keys() == torch.load(tmp_path / "model_0000003.pth", weights_only=True).keys()
    assert final["iteration"] == STEPS - 1
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(final["model"][name], value), name


def test_best_average_has_its_own(planned: Any, tmp_path: Path) -> None:
    plan = {step: found(50.0, 0.1) | {"ema": found(ap, 0.2 + ap / 100)} for step, ap in ((2, 1.0), (4, 3.0), (6, 2.0))}
    planned(plan, *EMA, "SOLVER.BEST_METRIC", "ema/bbox/AP")
    assert stored(tmp_path / "model_best.pth") == 0.23
    assert stored(tmp_path / "model_final_ema.pth") == 0.22


@pytest.mark.parametrize("last", [{}, {"bbox": {"AP": 1.0}}, found(1.0, math.nan)])
def test_without_a_threshold_nothing_is_stored(planned: Any, tmp_path: Path, last: dict) -> None:
    planned({2: found(1.0, 0.2), 4: found(2.0, 0.3), 6: last}, "SOLVER.BEST_METRIC", "")
    assert stored(tmp_path / "model_final.pth") is None


def test_without_an_evaluation_nothing_is_stored(data: tuple[Path, Path], tmp_path: Path) -> None:
    name = f"threshold_{tmp_path.name}"
    values = [*config_values(data, tmp_path, name), "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    cfg = load_config(RECIPE, values)
    register_datasets(cfg)
    DINOTrainer(cfg).train()
    assert stored(tmp_path / "model_final.pth") is None


def test_run_that_ends_early_has_the_threshold_of_its_end(planned: Any, tmp_path: Path) -> None:
    planned({2: found(30.0, 0.12), 4: found(20.0, 0.14)}, "SOLVER.EARLY_STOPPING", 1)
    assert stored(tmp_path / "model_final.pth") == 0.14
    assert stored(tmp_path / "model_best.pth") == 0.12


def test_run_that_is_evaluated_again_when_it_is_over(planned: Any, tmp_path: Path) -> None:
    plan = {2: found(10.0, 0.12), 4: found(20.0, 0.14), 6: found(30.0, 0.16)}
    planned(plan)
    written = (tmp_path / "model_final.pth").stat().st_mtime_ns
    planned(plan)
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == written  # it is there
    planned(plan | {6: found(30.0, 0.17)})
    assert stored(tmp_path / "model_final.pth") == 0.17


def test_weights_that_a_training_starts_from_hand_down_none(planned: Any, tmp_path: Path) -> None:
    trainer = planned({2: found(1.0, 0.2), 4: found(2.0, 0.3), 6: found(3.0, 0.4)})
    assert trainer.model.assumptions.score_threshold == 0.4
    weights = str((tmp_path / "model_final.pth").rename(tmp_path / "start.pth"))
    for path in (*tmp_path.glob("model_*.pth"), tmp_path / "last_checkpoint"):
        path.unlink()
    planned({2: {}, 4: {}, 6: {}}, "MODEL.WEIGHTS", weights, "SOLVER.BEST_METRIC", "")
    assert stored(tmp_path / "model_final.pth") is None


@pytest.mark.parametrize(
    ("results", "threshold"),
    [
        (found(1.0, 0.2), 0.2),
        ({"a": found(1.0, 0.2), "b": found(1.0, 0.3)}, 0.2),
        ({"b": found(1.0, 0.3)}, 0.3),
        ({"a": found(1.0, math.nan), "b": found(1.0, 0.3)}, 0.3),
        ({"a": {"bbox": {"AP": 1.0}}}, None),  # LVIS, Pascal VOC
        ({"bbox": {"AP": 1.0}, "queries": {"ATD100": 1.0}}, None),
        ({}, None),
    ],
)
def test_the_first_data_set_with_a_threshold_decides(results: dict, threshold: float | None) -> None:
    assert found_threshold(results, ("a", "b")) == threshold


def test_trained_detector_shows_what_its_evaluation_says(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing planned: as users have it."""
    values = [
        *config_values(data, tmp_path, f"threshold_{tmp_path.name}"),
        "SOLVER.MAX_ITER",
        "40",
        "SOLVER.STEPS",
        "()",
    ]
    cfg = load_config(RECIPE, values)
    register_datasets(cfg)
    torch.manual_seed(0)
    trainer = DINOTrainer(cfg)
    metrics = trainer.train()["bbox"]
    assert 0 < metrics["score_threshold"] < 1
    detector = Detector.from_pretrained(tmp_path / "model_final.pth", RECIPE, overrides=values)
    assert detector.threshold == metrics["score_threshold"]
    picture = data[1] / "1.png"
    shown, everything = detector(picture), detector(picture, threshold=0)
    assert 0 < len(shown) == (everything.scores > metrics["score_threshold"]).sum() < len(everything)
