"""What a study's file may say, and the configs that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studies.plan import Study, iterations_at, read_study
from tests.studies.conftest import ROOT

DINO = {"config": "small/dino_mobilenetv2_640"}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"buget": 5}, "unknown key 'buget'; did you mean budget"),
        ({"seeds": []}, "seeds is missing or empty"),
        ({"seeds": [1, 1]}, "different integers"),
        ({"seeds": 3}, "different integers"),
        ({"budget": "long"}, "budget is 'long'"),
        ({"evaluate_at": [6, 2]}, "ascending"),
        ({"evaluate_at": [2, 7]}, "at most the budget, 6"),
        ({"evaluate_at": [0, 6]}, "ascending"),
        ({"data": ["shapes"]}, "must be a mapping"),
        ({"data": {"a/b": None}}, "becomes a folder's name"),
        ({"detectors": {"dino": {}}}, "config is missing"),
        ({"detectors": {"dino": DINO | {"setings": {}}}}, "did you mean settings"),
        ({"detectors": {"dino": DINO | {"settings": {"SOLVER.BASE_LRR": 1.0}}}}, "did you mean SOLVER.BASE_LR"),
        ({"detectors": {"dino": DINO | {"settings": {"SOLVER.GAMMA": [1]}}}}, "dino on shapes"),
        ({"detectors": {"dino": DINO | {"settings": {"SOLVER.MAX_ITER": 9}}}}, "SOLVER.MAX_ITER is decided"),
        ({"detectors": {"dino": DINO | {"settings": ["no.yaml"]}}}, "no.yaml does not exist"),
        ({"detectors": {"dino": {"config": "small/dino_mobilnetv2_640"}}}, "did you mean small/dino_mobilenetv2_640"),
    ],
)
def test_mistakes_are_named(write_study: Callable[..., Path], others: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_study(write_study(**others))


def test_settings_are_laid_over_each_other(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("SOLVER: {BASE_LR: 0.1, MOMENTUM: 0.1, GAMMA: 0.1}\nINPUT: {COLOR_JITTER: 0.1}")
    own = {"SOLVER.MOMENTUM": 0.2, "INPUT.COLOR_JITTER": 0.2, "INPUT.MAX_SIZE_TEST": 2}
    file = write_study(
        detectors={"dino": DINO | {"settings": [str(overlay), own]}},
        settings={"INPUT.COLOR_JITTER": 0.3, "SOLVER.GAMMA": 0.3},
        data={"shapes": {"settings": {"INPUT.COLOR_JITTER": 0.4}}},
    )
    study = read_study(file)
    cfg = study.config(*study.pairs()[0])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.GAMMA) == (0.1, 0.2, 0.3)
    assert (cfg.INPUT.COLOR_JITTER, cfg.INPUT.MAX_SIZE_TEST) == (0.4, 2)


def test_runs_are_ordered_by_seed(make_study: Callable[..., Study]) -> None:
    study = make_study(detectors={"a": DINO, "b": DINO})
    assert [str(run) for run in study.runs()] == [
        "shapes/a/seed_1", "shapes/b/seed_1", "shapes/a/seed_2", "shapes/b/seed_2",
    ]  # fmt: skip


def test_seconds_become_iterations() -> None:
    assert iterations_at(60, 0.8) == 75
    assert iterations_at(60, 0.7) == 85  # 85.7: what is done by then
    assert iterations_at(0.3, 0.1) == 3  # not 2, by rounding
    assert iterations_at(1, 4) == 1


def test_config_of_a_run(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study()
    cfg = study.config_of_run(study.runs()[1], 60, tmp_path / "out")
    assert (2, 60, (50,), str(tmp_path / "out")) == (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.OUTPUT_DIR)
    assert (cfg.MODEL.DINO.NUM_CLASSES, cfg.MODEL.DINO.CLASS_NAMES) == (2, ["red", "blue"])
    assert [
        [f"shapes_{part}", str(tmp_path / "data" / f"{part}.json"), str(tmp_path / "data" / "train")]
        for part in ("train", "test")
    ] == cfg.DATASETS.COCO_FORMAT


def test_data_that_was_not_made(write_study: Callable[..., Path], tmp_path: Path) -> None:
    study = read_study(write_study())
    with pytest.raises(FileNotFoundError, match=r"make the data first, with dev/study.py data"):
        study.config_of_run(study.runs()[0], 1, tmp_path)


def test_digests(make_study: Callable[..., Study]) -> None:
    """A step's cost depends on the pictures' size and not on the learning rate; a result on both, not on the paths."""

    def digests(settings: dict[str, Any]) -> tuple[str, str]:
        study = make_study(detectors={"dino": DINO | {"settings": settings}})
        pair = study.pairs()[0]
        return study.settings_digest(*pair), study.cost_digest(*pair)

    settings, cost = digests({})
    rate = digests({"SOLVER.GAMMA": 0.3})
    size = digests({"INPUT.MAX_SIZE_TRAIN": 99})
    assert rate[0] != settings
    assert rate[1] == cost
    assert size[0] != settings
    assert size[1] != cost
    assert digests({}) == (settings, cost)


def test_every_detector_of_few_photos_sees_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = read_study(Path("studies/few_photos.yaml"))
    assert len(study.runs()) == 27
    for data in study.data:
        first, *others = [study.config(data, detector) for detector in study.detectors]
        for cfg in others:
            assert (first.INPUT.MOSAIC, cfg.INPUT.MOSAIC) == (0.5, 0)  # is of our recipe
            assert cfg.INPUT | {"MOSAIC": 0.5} == first.INPUT
            assert cfg.DATALOADER == first.DATALOADER
            assert (cfg.MODEL.TIMM.NAME, cfg.MODEL.WEIGHTS) == (first.MODEL.TIMM.NAME, first.MODEL.WEIGHTS)
            assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == (first.MODEL.PIXEL_MEAN, first.MODEL.PIXEL_STD)
            assert cfg.SOLVER.IMS_PER_BATCH == first.SOLVER.IMS_PER_BATCH == 2
            assert cfg.TEST == first.TEST
