"""torchvision's Faster R-CNN and RetinaNet as detectron2 models, with the same backbone, data and evaluation as ours.

What is theirs alone, heads, losses and the choice of positives, is torchvision's, unchanged. They take detectron2's
config keys for channels, anchors, score and NMS thresholds (`studies/peers.yaml`), and DINO's optimizer, AdamW.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from dino_d2.modeling.backbone.timm_wrapper import TimmBackbone


class PyramidBackbone(TimmBackbone):
    """A timm model and torchvision's feature pyramid over its maps, as torchvision's `BackboneWithFPN`.

    The parameters of the timm model have the same names as in DINO, so that both load the same file.

    Args:
        cfg: MODEL.TIMM, MODEL.BACKBONE.FREEZE_AT and MODEL.FPN.OUT_CHANNELS.
        extra: makes coarser maps.
    """

    def __init__(self, cfg: CfgNode, extra: ExtraFPNBlock):
        t = cfg.MODEL.TIMM
        freezing = {"freeze_batchnorm": t.FREEZE_BATCHNORM, "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT}
        super().__init__(t.NAME, t.OUT_INDICES, len(cfg.MODEL.PIXEL_MEAN), t.PRETRAINED, **freezing)
        self.out_channels = cfg.MODEL.FPN.OUT_CHANNELS
        self.fpn = FeaturePyramidNetwork(list(self._out_feature_channels.values()), self.out_channels, extra)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Maps (B, channels, h, w) by name, finest first."""
        x = x.contiguous(memory_format=torch.channels_last)  # as DINO's images: quicker on a CPU
        return self.fpn(OrderedDict(super().forward(x)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(self.out_channels, stride=self._out_feature_strides[name]) for name in self._out_features
        }


class WithoutResizing(GeneralizedRCNNTransform):
    """Normalises and batches images that the data loader has resized."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class Peer(nn.Module):
    """Puts a torchvision detector, the next base class, behind detectron2's interface."""

    first_class = 0  # the detector's label for it

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Losses in training; else the detections of each image as {"instances"}, in its original pixels."""
        device = next(self.parameters()).device
        images = [x["image"].to(device).float() for x in batched_inputs]
        if self.training:
            losses = super().forward(images, [self._target(x["instances"].to(device)) for x in batched_inputs])
            return {f"loss_{name.removeprefix('loss_')}": loss for name, loss in losses.items()}
        found = super().forward(images)
        return [{"instances": self._instances(*pair)} for pair in zip(found, batched_inputs, strict=True)]

    def _target(self, objects: Instances) -> dict[str, Tensor]:
        return {"boxes": objects.gt_boxes.tensor, "labels": objects.gt_classes + self.first_class}

    def _instances(self, found: dict[str, Tensor], record: dict[str, Any]) -> Instances:
        instances = Instances(tuple(record["image"].shape[-2:]), pred_boxes=Boxes(found["boxes"]))
        instances.scores, instances.pred_classes = found["scores"], found["labels"] - self.first_class
        return detector_postprocess(instances, record["height"], record["width"])


class FasterRCNNPeer(Peer, FasterRCNN):
    first_class = 1  # 0 is the background


class RetinaNetPeer(Peer, RetinaNet):
    pass


@META_ARCH_REGISTRY.register()
def TorchvisionFasterRCNN(cfg: CfgNode) -> FasterRCNNPeer:
    """Faster R-CNN on the backbone's maps and one more, pooled from the last."""
    heads = cfg.MODEL.ROI_HEADS
    backbone = PyramidBackbone(cfg, LastLevelMaxPool())
    maps = list(backbone.output_shape())
    model = FasterRCNNPeer(
        backbone,
        cfg.MODEL.DINO.NUM_CLASSES + 1,
        rpn_anchor_generator=_anchors(cfg, len(maps) + 1),
        box_roi_pool=MultiScaleRoIAlign(maps, output_size=7, sampling_ratio=2),
        box_score_thresh=heads.SCORE_THRESH_TEST,
        box_nms_thresh=heads.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return _with_transform(model, cfg)


@META_ARCH_REGISTRY.register()
def TorchvisionRetinaNet(cfg: CfgNode) -> RetinaNetPeer:
    """RetinaNet on the backbone's maps and two more, convolved from the last."""
    r = cfg.MODEL.RETINANET
    backbone = PyramidBackbone(cfg, LastLevelP6P7(cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS))
    model = RetinaNetPeer(
        backbone,
        cfg.MODEL.DINO.NUM_CLASSES,
        anchor_generator=_anchors(cfg, len(backbone.output_shape()) + 2),
        score_thresh=r.SCORE_THRESH_TEST,
        nms_thresh=r.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    return _with_transform(model, cfg)


def is_peer(cfg: CfgNode) -> bool:
    """Whether the config is of a detector in this file."""
    return cfg.MODEL.META_ARCHITECTURE in (TorchvisionFasterRCNN.__name__, TorchvisionRetinaNet.__name__)


def _with_transform(model: Peer, cfg: CfgNode) -> Peer:
    model.transform = WithoutResizing(1, 1, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD))
    return model


def _anchors(cfg: CfgNode, levels: int) -> AnchorGenerator:
    """Anchors of MODEL.ANCHOR_GENERATOR: SIZES and ASPECT_RATIOS of each level, or one list for all."""
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    of_levels = []
    for key in ("SIZES", "ASPECT_RATIOS"):
        values = anchors[key]
        if len(values) not in (1, levels):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key} has {len(values)} lists; {cfg.MODEL.META_ARCHITECTURE} has {levels} "
                "levels: give a list for each, or one for all"
            )
        of_levels.append(tuple(tuple(values[level % len(values)]) for level in range(levels)))
    return AnchorGenerator(*of_levels)
