"""The recipes in configs/: each of them trains, and says the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from dino_d2 import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
EPOCH = 7392  # iterations at batch 16: 118287 images of train2017, rounded down
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if path.parent not in (CONFIGS / "demo", CONFIGS / "overlays")  # tested by the demo; not recipes
)
LONGER = [name for name in NAMES if name.endswith(("24ep", "36ep", "50ep"))]
COMPLETE = [name for name in NAMES if "Base-" not in name]
FINE_TUNED = {  # recipe: what it starts from
    f"objects365/{model}_coco_18ep": f"output/objects365/{model}_26ep/model_final.pth"
    for model in ("dino_r50_4scale", "dino_swinl_5scale")
}
SMALL = [  # what keeps a step short
    "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", False,
    "MODEL.DINO.NUM_QUERIES", 30, "MODEL.DINO.DIM_FEEDFORWARD", 64,
    "MODEL.DINO.ENC_LAYERS", 1, "MODEL.DINO.DEC_LAYERS", 2, "MODEL.DINO.DN.NUMBER", 4,
    "MODEL.SWIN.DEPTHS", [2, 2, 2, 2], "MODEL.VITDET.DEPTH", 3, "MODEL.VITDET.GLOBAL_BLOCKS", [1],
]  # fmt: skip


def recipe(name: str, *overrides: object) -> CfgNode:
    return load_config(str(CONFIGS / f"{name}.yaml"), overrides)


def leaves(cfg: CfgNode, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in cfg.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return found


def differences(name: str, other: str) -> dict[str, object]:
    """What the first recipe says otherwise than the second."""
    theirs = leaves(recipe(other))
    return {key: value for key, value in leaves(recipe(name)).items() if value != theirs[key]}


def image_with_two_objects(num_classes: int) -> dict:
    boxes = torch.tensor([[4.0, 8.0, 30.0, 40.0], [20.0, 20.0, 60.0, 50.0]])
    instances = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, num_classes - 1]))
    return {"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8), "instances": instances}


SLOW_AGAIN = [name for name in NAMES if name.startswith("objects365/dino_swinl")]  # dino_swinl_5scale_12ep's model


@pytest.mark.parametrize("name", [name for name in NAMES if name not in [*LONGER, *SLOW_AGAIN]])
def test_recipe_trains_a_step_and_predicts(name: str) -> None:
    cfg = recipe(name, *SMALL)
    model = build_model(cfg)
    image = image_with_two_objects(cfg.MODEL.DINO.NUM_CLASSES)
    losses = model.train()([image])
    assert losses
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trainable)
    with torch.no_grad():
        (result,) = model.eval()([image])
    assert len(result["instances"]) > 0
    assert result["instances"].scores.isfinite().all()


# --- what the recipes say


def test_every_published_model_has_its_recipes() -> None:
    wanted = {f"dino_r50_{scales}scale_{epochs}ep" for scales in (4, 5) for epochs in (12, 24, 36)}
    wanted |= {f"dino_swinl_{scales}scale_{epochs}ep" for scales in (4, 5) for epochs in (12, 36)}
    others = ("r101", "swint", "swins", "swinb", "swinl224", "convnextt", "convnexts", "convnextb", "convnextl")
    wanted |= {f"dino_{backbone}_4scale_12ep" for backbone in others}
    wanted |= {f"dino_vitdet{size}_4scale_{epochs}ep" for size in "bl" for epochs in (12, 50)}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", LONGER)
def test_longer_recipe_changes_the_schedule_only(name: str) -> None:
    epochs, step = {"24ep": (24, 20), "36ep": (36, 30), "50ep": (50, 40)}[name[-4:]]
    assert differences(name, f"{name[:-4]}12ep") == {
        "SOLVER.MAX_ITER": epochs * EPOCH,
        "SOLVER.STEPS": (step * EPOCH,),
        "OUTPUT_DIR": f"output/{name}",
    }


@pytest.mark.parametrize("name", COMPLETE)
def test_recipe_writes_to_a_folder_of_its_own_name(name: str) -> None:
    assert f"output/{name}" == recipe(name).OUTPUT_DIR


@pytest.mark.parametrize("name", [name for name in COMPLETE if name not in FINE_TUNED])
def test_weights_are_of_the_backbone_in_the_recipe(name: str) -> None:
    cfg = recipe(name)
    backbone = cfg.MODEL.BACKBONE.NAME
    expected = ""
    if backbone == "build_resnet_backbone" and cfg.MODEL.RESNETS.DEPTH == 50:
        expected = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    if backbone == "build_vitdet_backbone":
        size = {12: "base", 24: "large"}[cfg.MODEL.VITDET.DEPTH]
        expected = f"detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_{size}.pth?matching_heuristics=True"
    assert expected == cfg.MODEL.WEIGHTS


@pytest.mark.parametrize(("name", "weights"), FINE_TUNED.items())
def test_fine_tuning_starts_from_a_detector(name: str, weights: str) -> None:
    assert weights == recipe(name).MODEL.WEIGHTS
    assert weights == recipe(name.replace("coco_18ep", "26ep")).OUTPUT_DIR + "/model_final.pth"


PUBLISHED = {
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "INPUT.FORMAT": "RGB",
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute_range",
    "INPUT.CROP.SIZE": [384, 600],
    "INPUT.CROP.PROBABILITY": 0.5,
    "INPUT.CROP.RESIZE_FIRST": [400, 500, 600],
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    "SOLVER.BIAS_LR_FACTOR": 1.0,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.WEIGHT_DECAY_NORM": 1e-4,
    "SOLVER.WEIGHT_DECAY_BIAS": None,  # as the weights
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.MAX_ITER": 12 * EPOCH,
    "SOLVER.STEPS": (11 * EPOCH,),
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.1,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "TEST.DETECTIONS_PER_IMAGE": 300,
    "MODEL.DINO.DN.NUMBER": 100,
    "MODEL.DINO.DN.REORDER_NEGATIVES": False,
    "MODEL.DINO.LOSS.CLASS": "focal",
    "MODEL.DINO.LOSS.CLASS_WEIGHT": 1.0,
    "MODEL.DINO.LOSS.DN_CLASS_WEIGHT": None,
    "MODEL.DINO.MATCHER.COPIES": 1,
    "MODEL.DINO.MATCHER.POSITION_MODULATED": False,
    "MODEL.DINO.MEMORY_FUSION": False,
}


@pytest.mark.parametrize(("key", "value"), PUBLISHED.items())
def test_base_is_the_published_recipe(key: str, value: object) -> None:
    found = leaves(recipe("Base-DINO"))[key]
    assert type(found)(value) == found if isinstance(found, (list, tuple)) else value == found


def test_five_scales_are_one_finer_map() -> None:
    assert differences("dino_r50_5scale_12ep", "dino_r50_4scale_12ep") == {
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.DINO.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.DINO.NUM_FEATURE_LEVELS": 5,
        "OUTPUT_DIR": "output/dino_r50_5scale_12ep",
    }
    assert differences("dino_swinl_5scale_12ep", "dino_swinl_4scale_12ep") == {
        "MODEL.SWIN.OUT_FEATURES": ["p0", "p1", "p2", "p3"],
        "MODEL.DINO.IN_FEATURES": ["p0", "p1", "p2", "p3"],
        "MODEL.DINO.NUM_FEATURE_LEVELS": 5,
        "OUTPUT_DIR": "output/dino_swinl_5scale_12ep",
    }


@pytest.mark.parametrize(
    ("name", "other", "model"),
    [
        ("dino_swins_4scale_12ep", "dino_swint_4scale_12ep", {"MODEL.SWIN.DEPTHS": [2, 2, 18, 2]}),
        ("dino_swinl224_4scale_12ep", "dino_swinl_4scale_12ep", {"MODEL.SWIN.WINDOW_SIZE": 7}),
        (
            "dino_swinb_4scale_12ep",
            "dino_swinl_4scale_12ep",
            {"MODEL.SWIN.EMBED_DIM": 128, "MODEL.SWIN.NUM_HEADS": [4, 8, 16, 32]},
        ),
        *(
            (
                f"dino_convnext{size[0]}_4scale_12ep",
                "dino_convnextl_4scale_12ep",
                {"MODEL.TIMM.NAME": f"convnext_{size}.fb_in22k_ft_in1k_384"},
            )
            for size in ("tiny", "small", "base")
        ),
    ],
)
def test_other_sizes_change_the_backbone_only(name: str, other: str, model: dict[str, object]) -> None:
    assert differences(name, other) == model | {"OUTPUT_DIR": f"output/{name}"}


def test_larger_vit_is_warmed_up_and_slowed_down_earlier() -> None:
    changed = differences("dino_vitdetl_4scale_12ep", "dino_vitdetb_4scale_12ep")
    assert {key: value for key, value in changed.items() if key.startswith("SOLVER.")} == {
        "SOLVER.WARMUP_ITERS": 250,
        "SOLVER.STEPS": (12 * EPOCH * 4 // 5,),
    }


def test_tuned_recipe_is_detrex_file_of_50() -> None:
    assert differences("dino_r50_4scale_12ep_tuned", "dino_r50_4scale_12ep") == {
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.DINO.DN.NUMBER": 300,
        "MODEL.DINO.LOSS.CLASS_WEIGHT": 2.0,
        "MODEL.DINO.LOSS.DN_CLASS_WEIGHT": 1.0,
        "SOLVER.BACKBONE_MULTIPLIER": 0.2,
        "OUTPUT_DIR": "output/dino_r50_4scale_12ep_tuned",
    }
    solver = recipe("dino_r50_4scale_12ep_tuned").SOLVER
    assert solver.BASE_LR * solver.BACKBONE_MULTIPLIER == 2e-5


FAMILY = {  # what differs from the tuned recipe
    "align_dino": {
        "MODEL.DINO.LOSS.CLASS": "iou_aware",
        "MODEL.DINO.LOSS.CLASS_WEIGHT": 1.0,
        "MODEL.DINO.MATCHER.COPIES": 2,
    },
    "stable_dino": {
        "MODEL.DINO.LOSS.CLASS": "position_supervised",
        "MODEL.DINO.LOSS.CLASS_WEIGHT": 6.0,
        "MODEL.DINO.MATCHER.POSITION_MODULATED": True,
        "MODEL.DINO.MEMORY_FUSION": True,
    },
    "dino_mal": {"MODEL.DINO.LOSS.CLASS": "matchability", "MODEL.DINO.LOSS.CLASS_WEIGHT": 1.0},
}


@pytest.mark.parametrize(("name", "settings"), FAMILY.items())
def test_successors_change_loss_assignment_and_fusion_of_the_tuned_recipe(name: str, settings: dict) -> None:
    name = f"family/{name}_r50_4scale_12ep"
    assert differences(name, "dino_r50_4scale_12ep_tuned") == settings | {"OUTPUT_DIR": f"output/{name}"}
    loss = recipe(name).MODEL.DINO.LOSS
    assert (loss.DN_CLASS_WEIGHT, loss.L1_WEIGHT, loss.GIOU_WEIGHT) == (1, 5, 2)


def test_ablations_add_one_idea_at_a_time() -> None:
    """Rows 2 to 5 of the paper's table 4; row 6 is the published recipe."""
    names = [name for name in NAMES if name.startswith("ablations/")]
    rows = [differences(name, "dino_r50_4scale_12ep") for name in [*names, "dino_r50_4scale_12ep"]]
    for row in rows:
        row.pop("OUTPUT_DIR", None)
    selection, forward, denoising = "MODEL.DINO.QUERY_SELECTION", "MODEL.DINO.LOOK_FORWARD", "MODEL.DINO.DN.TYPE"
    assert rows == [
        {selection: "static", forward: "once", denoising: "dn"},
        {selection: "pure", forward: "once", denoising: "dn"},
        {forward: "once", denoising: "dn"},
        {denoising: "dn"},
        {},
    ]


def test_interleaved_recipe_changes_the_encoder_only() -> None:
    assert differences("small/dino_r50_4scale_interleaved_12ep", "dino_r50_4scale_12ep") == {
        "MODEL.DINO.ENCODER": "interleaved",
        "MODEL.DINO.ENC_LAYERS": 3,
        "OUTPUT_DIR": "output/small/dino_r50_4scale_interleaved_12ep",
    }


def test_pictures_of_640_pixels_are_the_published_sizes_times_three_fifths() -> None:
    small, published = recipe("small/dino_r50_640").INPUT, recipe("dino_r50_4scale_12ep").INPUT
    assert [size * 3 // 5 for size in published.CROP.RESIZE_FIRST] == small.CROP.RESIZE_FIRST
    assert [size * 3 // 5 for size in published.CROP.SIZE] == small.CROP.SIZE
    for kind in (min, max):
        assert kind(small.MIN_SIZE_TRAIN) == kind(published.MIN_SIZE_TRAIN) * 3 // 5
    assert small.MIN_SIZE_TEST == published.MIN_SIZE_TEST * 3 // 5
    assert (small.MAX_SIZE_TRAIN, small.MAX_SIZE_TEST) == (640, 640)


@pytest.mark.parametrize("name", ["dino_r18_640", "dino_mobilenetv2_640"])
def test_small_recipes_change_the_model_only(name: str) -> None:
    changed = differences(f"small/{name}", "small/dino_r50_640")
    assert {key for key in changed if not key.startswith("MODEL.")} == {"OUTPUT_DIR"}


OBJECTS365 = {  # what pre-training changes, whatever the model
    "MODEL.DINO.NUM_CLASSES": 365,
    "DATASETS.COCO_FORMAT": [
        ["objects365_train", "datasets/objects365/zhiyuan_objv2_train.json", "datasets/objects365/train"],
        ["objects365_val", "datasets/objects365/zhiyuan_objv2_val.json", "datasets/objects365/val"],
    ],
    "DATASETS.TRAIN": ("objects365_train",),
    "DATASETS.TEST": (),
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.MAX_ITER": 26 * (1742289 // 64),
    "SOLVER.STEPS": (24 * (1742289 // 64),),
    "SOLVER.CHECKPOINT_PERIOD": 1742289 // 64,
    "SOLVER.AMP.ENABLED": True,
    "TEST.EVAL_PERIOD": 0,
}
LARGER = {  # what COCO after it changes
    "INPUT.MIN_SIZE_TRAIN": tuple(size * 3 // 2 for size in range(480, 801, 32)),
    "INPUT.MAX_SIZE_TRAIN": 2000,
    "INPUT.MIN_SIZE_TEST": 1200,
    "INPUT.MAX_SIZE_TEST": 2000,
    "INPUT.CROP.SIZE": [576, 900],
    "INPUT.CROP.RESIZE_FIRST": [600, 750, 900],
    "SOLVER.MAX_ITER": 18 * EPOCH,
    "SOLVER.STEPS": (8 * EPOCH,),
    "SOLVER.AMP.ENABLED": True,
}


@pytest.mark.parametrize(
    ("model", "dn"), [("dino_r50_4scale", {}), ("dino_swinl_5scale", {"MODEL.DINO.DN.NUMBER": 1000})]
)
def test_objects365_and_coco_after_it_change_the_data_and_the_schedule_only(model: str, dn: dict) -> None:
    before = differences(f"objects365/{model}_26ep", f"{model}_12ep")
    assert len(before.pop("MODEL.DINO.CLASS_NAMES")) == 365  # test_classes.py looks at each
    assert before == OBJECTS365 | dn | {"OUTPUT_DIR": f"output/objects365/{model}_26ep"}
    name = f"objects365/{model}_coco_18ep"
    after = differences(name, f"{model}_12ep")
    assert after == LARGER | dn | {"OUTPUT_DIR": f"output/{name}", "MODEL.WEIGHTS": FINE_TUNED[name]}
