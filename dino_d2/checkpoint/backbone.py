"""Convert ImageNet weights of a backbone, as saved by torchvision, the Swin release, timm and MAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from .convert import DERIVED, EXTRA_STATE, Conversion, ConversionError
from .names import torchvision_resnet

if TYPE_CHECKING:
    from dino_d2.meta_arch import DINO

CLASSIFIER = re.compile(r"(fc|head|norm|fc_norm|avgpool)\..+|cls_token")  # not needed for feature maps
COMPUTED = (*DERIVED, "attn_mask")
# What classifiers lack: norms of the feature maps, ViTDet's pyramid and relative positions.
DETECTOR_ONLY = re.compile(r"norm\d\.(weight|bias)|norms\..+|simfp_\d\..+|net\.blocks\.\d+\.attn\.rel_pos_[hw]")
MARKS = ("layer1.0.conv1.weight", "patch_embed.proj.weight")


def is_backbone(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the parameter names of a plain ResNet, Swin transformer or ViT."""
    return any(mark in state for mark in MARKS)


def from_backbone(state: Mapping[str, Tensor], model: DINO) -> Conversion:
    """The backbone's part of the state dict of `model`; the rest stays randomly initialised.

    Raises:
        ConversionError: unexpected or missing names, or different shapes.
    """
    # timm assigns patch merging to the following stage, the Swin release to the preceding one.
    shifted = "layers.3.downsample.reduction.weight" in state
    result, used, notes, lines = {}, set(), [], []
    for name, own in model.backbone.state_dict().items():
        theirs = torchvision_resnet(f"backbone.{name}") or name.removeprefix("net.")
        if shifted:
            theirs = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", theirs)
        if theirs in state and state[theirs].shape == own.shape:
            result[f"backbone.{name}"] = state[theirs].clone()
        elif theirs in state:
            lines.append(f"shape differs: {theirs} is {tuple(state[theirs].shape)}, backbone.{name} {tuple(own.shape)}")
        elif DETECTOR_ONLY.fullmatch(name) or name.endswith(COMPUTED):
            notes.append(f"backbone.{name}: not in the file, kept as initialised")
        else:
            lines.append(f"missing: {theirs} (for backbone.{name})")
        used.add(theirs)
    for name in sorted(set(state) - used):
        if CLASSIFIER.fullmatch(name) or name.endswith(COMPUTED):
            notes.append(f"{name}: not needed for feature maps, ignored")
        else:
            lines.append(f"unexpected: {name}")
    if lines:
        raise ConversionError("These backbone weights do not match the config:\n  " + "\n  ".join(lines))
    assumptions = replace(
        model.assumptions, class_names=(), num_classes=None, encoder="", memory_fusion=None, exact_positions=None
    )
    result[EXTRA_STATE] = assumptions.to_tensor()
    return Conversion(result, notes)
