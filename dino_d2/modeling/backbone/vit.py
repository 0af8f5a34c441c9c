"""Build detectron2's ViTDet (arXiv 2203.16527) from a YAML config."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from .freezing import warn_of_freezing

PATCH_SIZE = 16


@BACKBONE_REGISTRY.register()
def build_vitdet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build a plain ViT and its feature pyramid from `MODEL.VITDET`. The maps are p3 to p6 (strides 8 to 64).

    Images are not padded to squares or whole patches: as in detrex, where the published weights were trained, up to 15
    pixels at the right and bottom are not part of any patch. All of it is trained: `MODEL.BACKBONE.FREEZE_AT` does not
    apply.

    Raises:
        ValueError: a global block index is out of range.
    """
    warn_of_freezing(cfg)
    v = cfg.MODEL.VITDET
    if not set(v.GLOBAL_BLOCKS) <= set(range(v.DEPTH)):
        raise ValueError(
            f"MODEL.VITDET.GLOBAL_BLOCKS is {list(v.GLOBAL_BLOCKS)}; with MODEL.VITDET.DEPTH {v.DEPTH}, indices "
            f"are 0 to {v.DEPTH - 1}"
        )
    vit = ViT(
        img_size=v.IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=v.EMBED_DIM,
        depth=v.DEPTH,
        num_heads=v.NUM_HEADS,
        drop_path_rate=v.DROP_PATH_RATE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=v.WINDOW_SIZE,
        window_block_indexes=sorted(set(range(v.DEPTH)) - set(v.GLOBAL_BLOCKS)),
        out_feature="vit",
    )
    return SimpleFeaturePyramid(
        vit,
        in_feature="vit",
        out_channels=v.OUT_CHANNELS,
        scale_factors=(2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm="LN",
    )
