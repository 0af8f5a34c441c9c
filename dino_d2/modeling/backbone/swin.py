"""detectron2's Swin transformer, which it does not register itself."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Swin from `MODEL.SWIN`; its maps are p0 to p3 (strides 4 to 32)."""
    s = cfg.MODEL.SWIN
    return SwinTransformer(
        in_chans=input_shape.channels,
        embed_dim=s.EMBED_DIM,
        depths=s.DEPTHS,
        num_heads=s.NUM_HEADS,
        window_size=s.WINDOW_SIZE,
        drop_path_rate=s.DROP_PATH_RATE,
        out_indices=[int(name.removeprefix("p")) for name in s.OUT_FEATURES],
        use_checkpoint=s.CHECKPOINT,
    )
