from __future__ import annotations

import logging
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from dino_d2 import add_dino_config, load_config

RECIPE = Path(__file__).parent.parent / "configs" / "dino_r50_4scale_12ep.yaml"


@pytest.fixture
def default() -> CfgNode:
    cfg = get_cfg()
    add_dino_config(cfg)
    return cfg


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "NUM_CLASSES": 80,
        "NUM_QUERIES": 900,
        "NUM_FEATURE_LEVELS": 4,
        "IN_FEATURES": ["res3", "res4", "res5"],
        "HIDDEN_DIM": 256,
        "NHEADS": 8,
        "ENC_LAYERS": 6,
        "DEC_LAYERS": 6,
        "DIM_FEEDFORWARD": 2048,
        "NUM_POINTS": 4,
        "DROPOUT": 0.0,
        "QUERY_SELECTION": "mixed",
        "LOOK_FORWARD": "twice",
        "SHARE_HEADS": True,
        "POS_TEMPERATURE": 20.0,
        "POS_OFFSET": 0.0,
    }.items(),
)
def test_model_is_the_published_one_by_default(key: str, value: object, default: CfgNode) -> None:
    assert default.MODEL.DINO[key] == value
    assert type(default.MODEL.DINO[key]) is type(value)


@pytest.mark.parametrize(
    ("key", "value"),
    {"TYPE": "cdn", "NUMBER": 100, "LABEL_NOISE_RATIO": 0.5, "BOX_NOISE_SCALE": 1.0, "MAX_QUERIES": 0}.items(),
)
def test_denoising_is_the_published_one_by_default(key: str, value: object, default: CfgNode) -> None:
    assert default.MODEL.DINO.DN[key] == value
    assert type(default.MODEL.DINO.DN[key]) is type(value)  # detectron2 refuses 0.5 where the default is an integer


def test_losses_and_matching_are_the_published_ones_by_default(default: CfgNode) -> None:
    assert dict(default.MODEL.DINO.LOSS) == {
        "CLASS": "focal",
        "CLASS_WEIGHT": 1.0,
        "DN_CLASS_WEIGHT": None,  # the same
        "L1_WEIGHT": 5.0,
        "GIOU_WEIGHT": 2.0,
    }
    assert dict(default.MODEL.DINO.MATCHER) == {
        "CLASS_WEIGHT": 2.0,
        "L1_WEIGHT": 5.0,
        "GIOU_WEIGHT": 2.0,
        "COPIES": 1,
        "POSITION_MODULATED": False,
    }
    assert default.MODEL.DINO.MEMORY_FUSION is False


@pytest.mark.parametrize(
    ("key", "allowed"),
    [("QUERY_SELECTION", "mixed, pure, static"), ("LOOK_FORWARD", "twice, once"), ("DN__TYPE", "cdn, dn, none")],
)
def test_unknown_choice_is_refused_with_the_key_and_the_choices(key: str, allowed: str, tiny_config) -> None:
    cfg = tiny_config(**{key: "other"})
    with pytest.raises(ValueError, match=rf"MODEL\.DINO\.{key.replace('__', '.')} is 'other'.*{allowed}"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"HIDDEN_DIM": 80}, "HIDDEN_DIM"),
        ({"NHEADS": 5}, "NHEADS"),
        ({"NUM_FEATURE_LEVELS": 2}, "NUM_FEATURE_LEVELS"),
        ({"DN__NUMBER": 0}, r"DN\.NUMBER"),
        ({"DN__MAX_QUERIES": 1}, r"DN\.MAX_QUERIES"),
    ],
)
def test_setting_that_cannot_work_is_refused_by_name(changes: dict, named: str, tiny_config) -> None:
    cfg = tiny_config(**changes)
    with pytest.raises(ValueError, match=named):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("MODEL.DINO.NUM_CLASES", "MODEL.DINO.NUM_CLASSES"),
        ("NUM_QUERIES", "MODEL.DINO.NUM_QUERIES"),
        ("MODLE.DEVICE", "MODEL.DEVICE"),
    ],
)
def test_key_that_does_not_exist_is_named_with_its_place_and_the_nearest_one(
    key: str, near: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^unknown config key {key} in the overrides; did you mean {near}\?"):
        load_config(str(RECIPE), ["MODEL.DEVICE", "cpu", key, "3"])
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(key.split("."))]
    (tmp_path / "mine.yaml").write_text("\n".join([f"_BASE_: {RECIPE}", *lines]) + " 3\n")
    with pytest.raises(ValueError, match=rf"^unknown config key {key} in \S*mine\.yaml .*did you mean {near}\?"):
        load_config(str(tmp_path / "mine.yaml"))


def test_key_that_resembles_none_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"^unknown config key zzz in the overrides; see dino_d2/config\.py"):
        load_config(str(RECIPE), ["zzz", "3"])


def test_a_key_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"^SOLVER\.MAX_ITER in the overrides has no value"):
        load_config(RECIPE, ["SOLVER.BASE_LR", "1e-4", "SOLVER.MAX_ITER"])


def test_a_text_may_look_like_a_number() -> None:
    """Such as a folder named after its year."""
    cfg = load_config("dino_r50_4scale_12ep", ["OUTPUT_DIR", "2024", "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", "7"])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SOLVER.MAX_ITER) == ("2024", "", 7)


@pytest.mark.parametrize("text", ["MODEL: [", "OUTPUT_DIR: !!python/object/apply:os.mkdir [ran]"])
def test_files_that_are_not_mere_yaml_are_refused_and_run_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^config\.yaml .*is not plain YAML"):
        load_config("config.yaml")
    assert not Path("ran").exists()


def test_config_file_cannot_make_weights_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    published = tmp_path / "published.yaml"
    published.write_text(f"_BASE_: {RECIPE.parent / 'Base-DINO.yaml'}\nMODEL:\n  TRUST_WEIGHTS: True\n")
    logging.getLogger("dino_d2").propagate = True
    assert load_config(str(published)).MODEL.TRUST_WEIGHTS is False
    assert f"ignoring MODEL.TRUST_WEIGHTS in {published} (or its _BASE_)" in caplog.text
    assert load_config(str(published), ["MODEL.TRUST_WEIGHTS", "True"]).MODEL.TRUST_WEIGHTS is True
