"""detectron2's Swin transformer, which it does not register itself."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer
from detectron2.modeling.backbone.swin import SwinTransformerBlock
from torch import Tensor

from dino_d2.modeling.layers import call


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Swin from `MODEL.SWIN`; its maps are p0 to p3 (strides 4 to 32)."""
    s = cfg.MODEL.SWIN
    swin = SwinTransformer(
        in_chans=input_shape.channels,
        embed_dim=s.EMBED_DIM,
        depths=s.DEPTHS,
        num_heads=s.NUM_HEADS,
        window_size=s.WINDOW_SIZE,
        drop_path_rate=s.DROP_PATH_RATE,
        out_indices=[int(name.removeprefix("p")) for name in s.OUT_FEATURES],
    )
    if s.CHECKPOINT:
        for block in (module for module in swin.modules() if isinstance(module, SwinTransformerBlock)):
            block.__class__ = RecomputedBlock
    return swin


class RecomputedBlock(SwinTransformerBlock):
    """A block that keeps no activations and makes them again in the backward pass.

    detectron2's own way (`use_checkpoint`) is the one that PyTorch warns of, and leaves gradients out where no input
    has one.
    """

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        return call(super().forward, x, mask_matrix, recompute=True)
