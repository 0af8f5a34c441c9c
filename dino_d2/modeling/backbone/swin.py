"""Register detectron2's Swin transformer."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer
from detectron2.modeling.backbone.swin import SwinTransformerBlock
from torch import Tensor

from dino_d2.modeling.layers import maybe_checkpoint

from .freezing import warn_of_freezing


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Build a Swin transformer from `MODEL.SWIN`. Its feature maps are p0 to p3 (strides 4 to 32).

    All of it is trained, as in the published recipes: `MODEL.BACKBONE.FREEZE_AT` does not apply.
    """
    warn_of_freezing(cfg)
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
            block.__class__ = CheckpointedBlock
    return swin


class CheckpointedBlock(SwinTransformerBlock):
    """A Swin block with activation checkpointing.

    detectron2's own `use_checkpoint` uses the reentrant variant, which PyTorch warns about and which loses gradients
    if no input requires them.
    """

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        return maybe_checkpoint(super().forward, x, mask_matrix, recompute=True)
