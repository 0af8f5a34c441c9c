"""Use any timm model as a detectron2 backbone."""

from __future__ import annotations

from collections.abc import Sequence

import timm
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import Format
from torch import Tensor, nn

from .frozen_norm import FoldedBatchNorm, fold_following_norms


class TimmBackbone(Backbone):
    """`timm.create_model(name, features_only=True)`; timm's feature map i is named "stage{i}".

    Args:
        name: of the timm model.
        out_indices: timm's indices of the feature maps to return, finest first.
        in_channels: of the images.
        pretrained: let timm download its weights (or read them from its cache).
        freeze_batchnorm: freeze the statistics and affine parameters of batch norms.
        freeze_at: as in detectron2: 0 trains everything, 1 freezes the layers up to timm's map 0 (the stem), 2 those
            up to map 1, and so on.
        norm_maps: apply a newly initialised LayerNorm over the channels of each map.

    Raises:
        ValueError: `freeze_at` is more than the model has, or not supported for it.
        OSError: timm could not fetch the weights.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int],
        in_channels: int,
        pretrained: bool,
        freeze_batchnorm: bool,
        freeze_at: int,
        norm_maps: bool = False,
    ):
        super().__init__()
        try:
            self.body = timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=tuple(out_indices), in_chans=in_channels
            )
        except OSError as error:
            raise OSError(
                f"timm could not fetch the weights of {name} ({str(error).partition(chr(10))[0]}). Without a network: "
                "MODEL.TIMM.PRETRAINED False, and MODEL.WEIGHTS with weights that you have"
            ) from error
        self.freeze_batchnorm = freeze_batchnorm
        if freeze_batchnorm:
            for norm in self._batch_norms():
                norm.requires_grad_(False)
            self.train()
            fold_following_norms(self.body)
        # Some of timm's transformers return (B, h, w, channels).
        self.channels_last_maps = getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC
        info = self.body.feature_info
        if freeze_at > len(info.info):
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; for the timm model {name} it must be 0 to {len(info.info)}"
            )
        if freeze_at > 0:
            self._freeze_up_to(info.info[freeze_at - 1]["module"])
        self._out_features = [f"stage{index}" for index in out_indices]
        self._out_feature_channels = dict(zip(self._out_features, info.channels(), strict=True))
        self._out_feature_strides = dict(zip(self._out_features, info.reduction(), strict=True))
        normed = self._out_feature_channels if norm_maps else {}
        self.norms = nn.ModuleDict({name: LayerNorm(channels) for name, channels in normed.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps (B, channels, h, w) by name for images (B, 3, H, W)."""
        maps = self.body(x)
        if self.channels_last_maps:
            maps = [feature.permute(0, 3, 1, 2).contiguous() for feature in maps]
        named = dict(zip(self._out_features, maps, strict=True))
        return {name: self.norms[name](feature) if self.norms else feature for name, feature in named.items()}

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        if self.freeze_batchnorm:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, nn.BatchNorm2d | FoldedBatchNorm)]

    def _freeze_up_to(self, last: str) -> None:
        names = [name for name, _ in self.body.named_modules()]
        same = (last, last.replace(".", "_"))  # timm flattens some models' module names
        inside = [i for i, name in enumerate(names) if name in same or name.startswith(tuple(f"{s}." for s in same))]
        if not inside:
            raise ValueError(
                f"MODEL.BACKBONE.FREEZE_AT is not supported for this timm model, which has no module {last!r}; set it "
                "to 0"
            )
        end = inside[-1]
        for name in names[: end + 1]:
            for parameter in self.body.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(False)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a timm model from `MODEL.TIMM`."""
    t = cfg.MODEL.TIMM
    return TimmBackbone(
        t.NAME,
        t.OUT_INDICES,
        input_shape.channels,
        pretrained=t.PRETRAINED,
        freeze_batchnorm=t.FREEZE_BATCHNORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm_maps=t.NORM_MAPS,
    )
