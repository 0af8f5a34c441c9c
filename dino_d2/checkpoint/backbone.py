"""ImageNet weights of a backbone alone, as torchvision, the Swin release, timm and MAE save them."""

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

CLASSIFIER = re.compile(r"(fc|head|norm|fc_norm|avgpool)\..+|cls_token")  # what the maps do not need
COMPUTED = (*DERIVED, "attn_mask")
# What no classifier has: norms of the maps, the pyramid and the relative positions of ViTDet.
DETECTORS_OWN = re.compile(r"norm\d\.(weight|bias)|norms\..+|simfp_\d\..+|net\.blocks\.\d+\.attn\.rel_pos_[hw]")
MARKS = ("layer1.0.conv1.weight", "patch_embed.proj.weight")


def is_backbone(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a ResNet, a Swin transformer or a ViT alone."""
    return any(mark in state for mark in MARKS)


def from_backbone(state: Mapping[str, Tensor], model: DINO) -> Conversion:
    """The backbone's part of the state dict of `model`; training starts the rest anew.

    Raises:
        ConversionError: a name left over, missing or of another shape.
    """
    # timm counts the merging of patches to the stage after it, the Swin release to the one before.
    shifted = "layers.3.downsample.reduction.weight" in state
    result, used, notes, lines = {}, set(), [], []
    for name, own in model.backbone.state_dict().items():
        theirs = torchvision_resnet(f"backbone.{name}") or name.removeprefix("net.")
        if shifted:
            theirs = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", theirs)
        if theirs in state and state[theirs].shape == own.shape:
            result[f"backbone.{name}"] = state[theirs].clone()
        elif theirs in state:
            lines.append(f"not fitting: {theirs} is {tuple(state[theirs].shape)}, backbone.{name} {tuple(own.shape)}")
        elif DETECTORS_OWN.fullmatch(name) or name.endswith(COMPUTED):
            notes.append(f"backbone.{name}: not in the file, left as initialised")
        else:
            lines.append(f"missing: {theirs} (for backbone.{name})")
        used.add(theirs)
    for name in sorted(set(state) - used):
        if CLASSIFIER.fullmatch(name) or name.endswith(COMPUTED):
            notes.append(f"{name}: not part of the maps, left out")
        else:
            lines.append(f"left over: {name}")
    if lines:
        raise ConversionError("These backbone weights do not fit the config:\n  " + "\n  ".join(lines))
    good_for_any = replace(model.assumptions, class_names=(), num_classes=None, encoder="", memory_fusion=None)
    result[EXTRA_STATE] = good_for_any.to_tensor()
    return Conversion(result, notes)
