"""The keys that dino_d2 adds to detectron2's config. The defaults are the published recipe."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from dino_d2_cli import shipped

OVERLAYS = "overlays"  # folder in configs/ of settings that are laid over any recipe


def add_dino_config(cfg: CN) -> None:
    """Add DINO's keys to a config made by `detectron2.config.get_cfg()`."""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"  # run without a GPU out of the box

    # Also load weight files that can run code (pickled objects, not just tensors). Ignored in config files: whoever
    # publishes one with weights must not be able to switch it on.
    cfg.MODEL.TRUST_WEIGHTS = False

    c = cfg.MODEL.DINO = CN()
    c.NUM_CLASSES = 80  # classes of the dataset, without background
    c.CLASS_NAMES = []  # their names, in order; empty: the dataset's. Saved with the weights
    c.NUM_QUERIES = (
        900  # more than TEST.DETECTIONS_PER_IMAGE, which are the best of them; may be lowered after training
    )
    c.IN_FEATURES = ["res3", "res4", "res5"]  # backbone feature maps, finest first; with four of them: 5-scale
    c.NUM_FEATURE_LEVELS = 4  # those maps and coarser ones derived from the last
    c.HIDDEN_DIM = 256  # channels of tokens and queries
    c.NHEADS = 8  # of every attention module
    c.ENCODER = (
        "deformable"  # deformable | interleaved: update all tokens in every layer, or the finest level less often
    )
    c.ENC_LAYERS = 6  # layers; blocks of the interleaved encoder
    c.MEMORY_FUSION = False  # combine the outputs of all encoder layers (Stable-DINO)
    c.DEC_LAYERS = 6
    c.DIM_FEEDFORWARD = 2048  # hidden channels of the feed-forward blocks
    c.NUM_POINTS = 4  # samples per head and level
    c.OP = "auto"  # auto | compiled | reference: best available; error without compiled kernels; plain PyTorch
    c.DROPOUT = 0.0  # of attention and feed-forward blocks
    c.QUERY_SELECTION = "mixed"  # mixed | pure | static: what queries take from the encoder (section 3.4)
    c.QUERY_SCORE_THRESHOLD = 0.0  # at inference, drop queries from tokens that score less; 0: always NUM_QUERIES
    c.LOOK_FORWARD = "twice"  # twice | once: how many layers a box loss trains (section 3.5)
    c.SHARE_HEADS = True  # share the class and box head between decoder layers, or one of each per layer
    c.NMS_THRESHOLD = 1.0  # IoU threshold of per-class NMS; 1: no NMS, which DINO does not need
    c.BOX_VOTING = False  # with NMS: the boxes that are left become means of those around the same object
    c.EXACT_POSITIONS = False  # tokens lie where their stride puts them, not spread over the image (docs/few_photos.md)
    c.POS_TEMPERATURE = 20.0  # of the sine position embedding
    c.POS_OFFSET = 0.0  # added to pixel indices there; -0.5 in the detectron2 port's weights

    c.INTERLEAVED = CN()  # a block of the interleaved encoder
    c.INTERLEAVED.COARSE_UPDATES = 2  # updates of the coarse levels before each of the finest
    c.INTERLEAVED.FINEST_FEEDFORWARD = 512  # hidden channels of the finest level's feed-forward block; 0: no update

    c.DN = CN()
    c.DN.TYPE = "cdn"  # cdn | dn | none: with negatives (section 3.3), without (DN-DETR), off
    c.DN.NUMBER = 100  # positives per image, roughly: (NUMBER // most objects in an image) groups
    c.DN.LABEL_NOISE_RATIO = 0.5  # a label is replaced with half this probability
    c.DN.BOX_NOISE_SCALE = 1.0  # lambda_1, as a fraction of half the box side
    c.DN.REORDER_NEGATIVES = False  # swap back corners that changed places; the official code does not
    c.DN.MAX_QUERIES = 0  # limit on denoising queries per image, for crowded images; 0: no limit

    # Activation checkpointing: less memory for one more forward pass of that part.
    c.CHECKPOINT = CN()
    c.CHECKPOINT.BACKBONE = False  # as a whole (MODEL.SWIN.CHECKPOINT: block by block)
    c.CHECKPOINT.ENCODER = False  # layer by layer
    c.CHECKPOINT.DECODER = False  # layer by layer

    c.LOSS = CN()
    c.LOSS.CLASS = "focal"  # focal | iou_aware | position_supervised | matchability: class loss (docs/family.md)
    c.LOSS.CLASS_WEIGHT = 1.0
    c.LOSS.DN_CLASS_WEIGHT = None  # class loss weight of the denoising queries; None: CLASS_WEIGHT
    c.LOSS.L1_WEIGHT = 5.0
    c.LOSS.GIOU_WEIGHT = 2.0
    c.MATCHER = CN()
    c.MATCHER.CLASS_WEIGHT = 2.0
    c.MATCHER.L1_WEIGHT = 5.0
    c.MATCHER.GIOU_WEIGHT = 2.0
    c.MATCHER.COPIES = 1  # queries matched per object, except in the last layer (Align-DETR)
    c.MATCHER.POSITION_MODULATED = False  # scale scores in the cost by box quality (Stable-DINO)

    # Swin and ViT are always trained whole: MODEL.BACKBONE.FREEZE_AT is for ResNet and timm.
    s = cfg.MODEL.SWIN = CN()  # for MODEL.BACKBONE.NAME: build_swin_backbone (defaults: Swin-T)
    s.EMBED_DIM = 96
    s.DEPTHS = [2, 2, 6, 2]
    s.NUM_HEADS = [3, 6, 12, 24]
    s.WINDOW_SIZE = 7
    s.DROP_PATH_RATE = 0.2
    s.OUT_FEATURES = ["p1", "p2", "p3"]  # p0 to p3: strides 4 to 32
    s.CHECKPOINT = False  # activation checkpointing: less memory, more time

    t = cfg.MODEL.TIMM = CN()  # for MODEL.BACKBONE.NAME: build_timm_backbone
    t.NAME = "mobilenetv2_100"  # any timm model with features_only
    t.OUT_INDICES = [2, 3, 4]  # timm's indices of the feature maps, named "stage2", "stage3", …
    t.PRETRAINED = False  # let timm download its weights (MODEL.WEIGHTS is loaded afterwards)
    t.FREEZE_BATCHNORM = True  # freeze running statistics and affine parameters
    t.NORM_MAPS = False  # LayerNorm over the channels of each map, as in detrex's ConvNeXt

    v = cfg.MODEL.VITDET = CN()  # for MODEL.BACKBONE.NAME: build_vitdet_backbone (defaults: ViT-B)
    v.EMBED_DIM = 768
    v.DEPTH = 12  # blocks
    v.NUM_HEADS = 12
    v.WINDOW_SIZE = 14  # side of the attention windows of the other blocks, in tokens
    v.GLOBAL_BLOCKS = [2, 5, 8, 11]  # indices of the blocks with global attention
    v.DROP_PATH_RATE = 0.1
    v.IMAGE_SIZE = 1024  # side in pixels that relative positions are learned for; interpolated for other sizes
    v.OUT_CHANNELS = 256  # of every map

    # Datasets in COCO format to register: [name, annotation file, image folder]
    cfg.DATASETS.COCO_FORMAT = []

    cfg.INPUT.CROP.PROBABILITY = 0.5  # of cropping to INPUT.CROP.SIZE
    cfg.INPUT.CROP.RESIZE_FIRST = [400, 500, 600]  # choices for the shorter side before the crop; empty: no resize
    cfg.INPUT.VERTICAL_FLIP = False  # half of the time, for images without an up, such as aerial ones
    cfg.INPUT.QUARTER_TURN = False  # rotate by 90 degrees, half of the time
    cfg.INPUT.COLOR_JITTER = 0.0  # change brightness, contrast and saturation by up to this fraction
    cfg.INPUT.MOSAIC = 0.0  # fraction of training images that are joined with one or three others; docs/data.md
    cfg.INPUT.ON_UNREADABLE = "stop"  # stop | skip: what training does when an image cannot be read; docs/data.md

    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # of the learning rate
    cfg.SOLVER.AMP.DTYPE = "float16"  # or bfloat16, which also works on the CPU; used if SOLVER.AMP.ENABLED
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # split each process's batch into this many parts: less memory, same gradients
    cfg.SOLVER.ON_NON_FINITE = "stop"  # stop | skip: what to do after reporting an infinite or NaN loss or gradient
    cfg.SOLVER.CHECKPOINT_KEEP = 0  # keep this many of the newest periodic checkpoints; 0: all
    cfg.SOLVER.BEST_METRIC = ""  # a result of evaluation, higher is better (bbox/AP): keep the best as model_best.pth
    cfg.SOLVER.EARLY_STOPPING = 0  # stop after this many evaluations without a better BEST_METRIC; 0: never
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False  # maintain, evaluate and save a moving average of the weights
    cfg.SOLVER.EMA.DECAY = 0.9997  # per step; 0.99 for runs of a thousand steps

    # TEST.AUG is detectron2's test-time augmentation (sizes, flip); see docs/evaluation.md
    cfg.TEST.AUG.NMS_THRESHOLD = 0.7  # IoU threshold of per-class NMS over the copies; a lower one of the model holds
    cfg.TEST.AMP = CN()  # evaluate and predict in mixed precision
    cfg.TEST.AMP.ENABLED = False
    cfg.TEST.AMP.DTYPE = "bfloat16"  # or float16
    cfg.TEST.QUANTIZE = "none"  # none | int8: products of encoder and decoder in 8-bit integers, on a CPU
    cfg.TEST.COCO_BACKEND = "auto"  # auto | pycocotools | hotcoco: computes COCO AP; auto: faster if equal
    cfg.TEST.MAX_DETS_PER_IMAGE = 100  # per image and class, counted in AP, 10 at least; other values deviate from COCO
    cfg.TEST.REPORT = False  # after the last evaluation make OUTPUT_DIR/report, a page that shows what goes wrong
    cfg.TEST.QUERY_METRICS = False  # also report anchor distances, duplicates and the AP of every decoder layer

    cfg.WANDB_PROJECT = ""  # Weights & Biases project that logs all training scalars; empty: not used


def load_config(config_file: str, overrides: Sequence[str] = (), defaults: Sequence[Any] = ()) -> CN:
    """Merge detectron2's defaults, DINO's, `defaults`, the file and `overrides`, in that order.

    A config saved on a machine with a GPU runs on the CPU if there is no GPU, with a warning.

    Args:
        config_file: path, or name of a recipe (:func:`find_config_file`).
        overrides, defaults: KEY VALUE KEY VALUE ….

    Raises:
        FileNotFoundError: neither a file nor a recipe of that name.
        ValueError: an unknown key (the message suggests a similar one), a key without a value, a file that is not YAML,
            or YAML that would run code.
    """
    config_file = find_config_file(config_file)
    cfg = get_cfg()
    add_dino_config(cfg)
    default_device = cfg.MODEL.DEVICE
    try:
        in_file = flat(cfg.load_yaml_with_base(config_file))
    except yaml.YAMLError as error:
        raise ValueError(f"{config_file} (or its _BASE_) is not plain YAML: {error}") from error
    _refuse_unknown(in_file, cfg, f"{config_file} (or its _BASE_)")
    _refuse_unknown(overrides[::2], cfg, "the overrides")
    if len(overrides) % 2:
        raise ValueError(f"{overrides[-1]} in the overrides has no value: give KEY VALUE KEY VALUE …")
    cfg.merge_from_list(list(defaults))
    cfg.merge_from_file(config_file, allow_unsafe=False)
    if cfg.MODEL.TRUST_WEIGHTS:
        cfg.MODEL.TRUST_WEIGHTS = False
        logging.getLogger(__name__).warning(
            "ignoring MODEL.TRUST_WEIGHTS in %s (or its _BASE_): pass MODEL.TRUST_WEIGHTS True on the command line if "
            "you trust the weights",
            config_file,
        )
    cfg.merge_from_list([part for item in _as_texts(overrides, flat(cfg)) for part in item])
    if default_device != cfg.MODEL.DEVICE and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("MODEL.DEVICE is %s, but there is no GPU: using the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = default_device
    return cfg


def _as_texts(overrides: Sequence[Any], values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The overrides in pairs. What stands for a text and looks like a number, such as OUTPUT_DIR 2024, stays a text: it
    is quoted, because it will be read as Python."""
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        is_number = isinstance(value, str) and re.fullmatch(r"[-+\d._e]+", value) is not None
        yield key, repr(value) if is_number and isinstance(values.get(key), str) else value


def default_device() -> str:
    """detectron2's default device, or the CPU where it is not available."""
    cfg = get_cfg()
    add_dino_config(cfg)
    return cfg.MODEL.DEVICE


def find_config_file(name: str | os.PathLike) -> str:
    """The path of an existing config file, else of the recipe of that name.

    Recipes are named after their files in `configs/`, bases and overlays left out: "dino_r50_4scale_12ep",
    "small/dino_r18_640".

    Raises:
        FileNotFoundError: neither exists; the message suggests similar recipes.
    """
    name = os.fspath(name)
    if PathManager.isfile(name):
        return name
    recipes = recipe_files()
    found = recipes.get(name.removesuffix(".yaml"))
    if found is None:
        near = difflib.get_close_matches(name.removesuffix(".yaml"), recipes, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"the recipes are {', '.join(recipes)}"
        raise FileNotFoundError(f"{name} is neither a config file nor the name of a recipe; {hint}")
    return found


def recipe_files() -> dict[str, str]:
    """Map the name of every recipe to its path."""
    folder = shipped("configs")
    files = sorted(
        path
        for path in folder.rglob("*.yaml")
        if not path.name.startswith("Base-") and path.parent != folder / OVERLAYS
    )
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in files}


def overlay(name: str) -> list[tuple[str, Any]]:
    """KEY and VALUE of the settings in `configs/overlays/`."""
    return list(flat(yaml.safe_load((shipped("configs") / OVERLAYS / f"{name}.yaml").read_text())).items())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted key, in order."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _refuse_unknown(keys: Iterable[str], cfg: CN, origin: str) -> None:
    known = flat(cfg)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see dino_d2/config.py and detectron2's defaults"
            raise ValueError(f"unknown config key {key} in {origin}; {hint}")
