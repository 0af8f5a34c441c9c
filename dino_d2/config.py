"""Every key that dino_d2 adds to detectron2's config, with its default: the published recipe."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from dino_d2_cli import shipped


def add_dino_config(cfg: CN) -> None:
    """Add DINO's keys to a config made by `detectron2.config.get_cfg()`."""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"  # no GPU is an ordinary case

    # Load files that could run code, too (pickled objects, not mere tensors). In a config file it is ignored: who
    # publishes one beside weights must not decide on it.
    cfg.MODEL.TRUST_WEIGHTS = False

    c = cfg.MODEL.DINO = CN()
    c.NUM_CLASSES = 80  # classes of the data, counted from 0, without background
    c.CLASS_NAMES = []  # their names in that order, or none: the data set's; saved with the weights
    c.NUM_QUERIES = 900  # detections before the best are taken (TEST.DETECTIONS_PER_IMAGE); may be lowered later
    c.IN_FEATURES = ["res3", "res4", "res5"]  # backbone maps, finest first; four of them: 5-scale
    c.NUM_FEATURE_LEVELS = 4  # those maps and coarser ones made of the last
    c.HIDDEN_DIM = 256  # channels of tokens and queries
    c.NHEADS = 8  # of every attention
    c.ENCODER = "deformable"  # deformable | interleaved: all tokens in every layer, or the finest level's rarely
    c.ENC_LAYERS = 6  # of the interleaved encoder: blocks
    c.MEMORY_FUSION = False  # combine the outputs of all encoder layers (Stable-DINO)
    c.DEC_LAYERS = 6
    c.DIM_FEEDFORWARD = 2048  # hidden channels of the feed-forward blocks
    c.NUM_POINTS = 4  # samples per head and level
    c.OP = "auto"  # auto | compiled | reference: the best there is; refuse to run without kernels; plain PyTorch
    c.DROPOUT = 0.0  # of attention and feed-forward blocks
    c.QUERY_SELECTION = "mixed"  # mixed | pure | static: what the encoder gives the queries (section 3.4)
    c.QUERY_SCORE_THRESHOLD = 0.0  # in prediction, no queries of tokens that score less; 0: always NUM_QUERIES
    c.LOOK_FORWARD = "twice"  # twice | once: how far a layer's box loss reaches back (section 3.5)
    c.SHARE_HEADS = True  # one class and one box head for all decoder layers, or one of each per layer
    c.NMS_THRESHOLD = 1.0  # IoU above which the worse of two detections of one class is dropped; 1: DINO needs none
    c.POS_TEMPERATURE = 20.0  # of the pixels' sine embedding
    c.POS_OFFSET = 0.0  # of the pixel number in it; -0.5 in the detectron2 port's weights

    c.INTERLEAVED = CN()  # a block of that encoder
    c.INTERLEAVED.COARSE_UPDATES = 2  # of the coarse levels, before the one of the finest
    c.INTERLEAVED.FINEST_FEEDFORWARD = 512  # hidden channels of the feed-forward block of that one

    c.DN = CN()
    c.DN.TYPE = "cdn"  # cdn | dn | none: with negatives (section 3.3), without (DN-DETR), off
    c.DN.NUMBER = 100  # positives per image, about: it is divided by the most objects in one image
    c.DN.LABEL_NOISE_RATIO = 0.5  # a label is redrawn with half of this probability
    c.DN.BOX_NOISE_SCALE = 1.0  # lambda_1, in half sides of the box
    c.DN.REORDER_NEGATIVES = False  # put corners that changed places back in order; the published program does not
    c.DN.MAX_QUERIES = 0  # bound on denoising queries per image, for images full of objects; 0: none

    # Recompute activations in the backward pass: less memory, a forward pass more of that part.
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

    s = cfg.MODEL.SWIN = CN()  # for MODEL.BACKBONE.NAME: build_swin_backbone (defaults: Swin-T)
    s.EMBED_DIM = 96
    s.DEPTHS = [2, 2, 6, 2]
    s.NUM_HEADS = [3, 6, 12, 24]
    s.WINDOW_SIZE = 7
    s.DROP_PATH_RATE = 0.2
    s.OUT_FEATURES = ["p1", "p2", "p3"]  # p0 to p3: strides 4 to 32
    s.CHECKPOINT = False  # recompute activations in the backward pass: less memory, more time

    t = cfg.MODEL.TIMM = CN()  # for MODEL.BACKBONE.NAME: build_timm_backbone
    t.NAME = "mobilenetv2_100"  # any timm model with features_only
    t.OUT_INDICES = [2, 3, 4]  # timm's numbers of the maps, named "stage2", "stage3", …
    t.PRETRAINED = False  # let timm fetch its weights (MODEL.WEIGHTS is loaded after it)
    t.FREEZE_BATCHNORM = True  # keep running statistics and affine parameters as loaded
    t.NORM_MAPS = False  # a LayerNorm over the channels of each map, as detrex's ConvNeXt has

    v = cfg.MODEL.VITDET = CN()  # for MODEL.BACKBONE.NAME: build_vitdet_backbone (defaults: ViT-B)
    v.EMBED_DIM = 768
    v.DEPTH = 12  # blocks
    v.NUM_HEADS = 12
    v.WINDOW_SIZE = 14  # side of the windows that the other blocks attend in, in tokens
    v.GLOBAL_BLOCKS = [2, 5, 8, 11]  # blocks that attend to the whole picture, counted from 0
    v.DROP_PATH_RATE = 0.1
    v.IMAGE_SIZE = 1024  # side in pixels that the relative positions are learned for; interpolated for others
    v.OUT_CHANNELS = 256  # of every map

    # [name, annotation file, image folder] of data sets in COCO's format, to be registered
    cfg.DATASETS.COCO_FORMAT = []

    cfg.INPUT.CROP.PROBABILITY = 0.5  # of cropping to INPUT.CROP.SIZE
    cfg.INPUT.CROP.RESIZE_FIRST = [400, 500, 600]  # short sides drawn from before the crop; empty: no resize
    cfg.INPUT.VERTICAL_FLIP = False  # flip upside down, half of the time (pictures without an up, as from the air)
    cfg.INPUT.QUARTER_TURN = False  # turn by 90 degrees, half of the time
    cfg.INPUT.COLOR_JITTER = 0.0  # brightness, contrast and saturation change by up to this share
    cfg.INPUT.ON_UNREADABLE = "stop"  # stop | skip: what training does at a picture that cannot be read; docs/data.md

    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # of the learning rate
    cfg.SOLVER.AMP.DTYPE = "float16"  # or bfloat16, which the CPU has too; used if SOLVER.AMP.ENABLED
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # parts in which a process works on its images: less memory, the same gradients
    cfg.SOLVER.ON_NON_FINITE = "stop"  # stop | skip: what to do after a report of a loss that is infinite or NaN
    cfg.SOLVER.CHECKPOINT_KEEP = 0  # so many of the newest periodic checkpoints, the older ones are removed; 0: all
    cfg.SOLVER.BEST_METRIC = ""  # such as bbox/AP: keep the weights that were best in it as model_best.pth
    cfg.SOLVER.EARLY_STOPPING = 0  # stop after so many evaluations that were not better in BEST_METRIC; 0: never
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False  # keep, evaluate and save a moving average of the weights
    cfg.SOLVER.EMA.DECAY = 0.9997  # share that the average keeps at each step; 0.99 for runs of a thousand steps

    # TEST.AUG is detectron2's test-time augmentation: sizes, flip. docs/evaluation.md
    cfg.TEST.AUG.NMS_THRESHOLD = 0.7  # IoU above which detections of one class in two copies are one object
    cfg.TEST.AMP = CN()  # evaluation and prediction in mixed precision
    cfg.TEST.AMP.ENABLED = False
    cfg.TEST.AMP.DTYPE = "bfloat16"  # or float16
    cfg.TEST.COCO_BACKEND = "auto"  # auto | pycocotools | hotcoco: what computes COCO's AP; auto: the faster if equal
    cfg.TEST.MAX_DETS_PER_IMAGE = 100  # detections of an image and class that count in AP; others are no longer COCO's
    cfg.TEST.QUERY_METRICS = False  # beside AP: distance of the anchors, duplicates, AP of every decoder layer

    cfg.WANDB_PROJECT = ""  # of Weights & Biases, for all scalars of training; empty: not used


def load_config(config_file: str, overrides: Sequence[str] = (), defaults: Sequence[Any] = ()) -> CN:
    """detectron2's defaults, DINO's, `defaults`, the file's values, then `overrides`; both are KEY VALUE KEY VALUE ….

    `config_file` is a path, or the name of a recipe (:func:`find_config_file`). A config saved on a machine with a GPU
    is used on the CPU where there is none, and says so.

    Raises:
        FileNotFoundError: there is neither a file nor a recipe of that name.
        ValueError: a key that does not exist (it names the nearest one that does) or has no value; a file that is not
            YAML, or YAML that would run code.
    """
    config_file = find_config_file(config_file)
    cfg = get_cfg()
    add_dino_config(cfg)
    default_device = cfg.MODEL.DEVICE
    try:
        in_file = _keys(cfg.load_yaml_with_base(config_file))
    except yaml.YAMLError as error:
        raise ValueError(f"{config_file} (or the _BASE_ of it) cannot be read as mere YAML: {error}") from error
    _refuse_unknown(in_file, cfg, f"{config_file} (or the _BASE_ of it)")
    _refuse_unknown(overrides[::2], cfg, "the overrides")
    if len(overrides) % 2:
        raise ValueError(f"{overrides[-1]} in the overrides has no value: they are KEY VALUE KEY VALUE …")
    cfg.merge_from_list(list(defaults))
    cfg.merge_from_file(config_file, allow_unsafe=False)
    if cfg.MODEL.TRUST_WEIGHTS:
        cfg.MODEL.TRUST_WEIGHTS = False
        logging.getLogger(__name__).warning(
            "MODEL.TRUST_WEIGHTS in %s (or the _BASE_ of it) is ignored: say MODEL.TRUST_WEIGHTS True on the command "
            "line if you trust the weights",
            config_file,
        )
    cfg.merge_from_list(list(overrides))
    if default_device != cfg.MODEL.DEVICE and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("MODEL.DEVICE is %s, which is not there: using the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = default_device
    return cfg


def find_config_file(name: str | os.PathLike) -> str:
    """The path of a config file that is there, else of the recipe of that name.

    Recipes are named as their files in `configs/`: "dino_r50_4scale_12ep", "small/dino_r18_640".

    Raises:
        FileNotFoundError: there is neither; it names recipes that are spelt alike.
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
    """Name -> path of every recipe."""
    folder = shipped("configs")
    files = sorted(path for path in folder.rglob("*.yaml") if not path.name.startswith("Base-"))
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in files}


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The full names of all values in nested dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _refuse_unknown(keys: Iterable[str], cfg: CN, origin: str) -> None:
    known = set(_keys(cfg))
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "dino_d2/config.py and detectron2's config list all keys"
            raise ValueError(f"{key} in {origin} is no config key; {hint}")
