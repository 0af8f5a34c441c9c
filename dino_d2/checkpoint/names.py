"""Map our parameter names to those in published checkpoints.

Only this direction is defined; reading and writing both use it. A parameter can have several names there, because
shared modules were saved once per use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Rules = list[tuple[str, str]]


@dataclass(frozen=True)
class Layout:
    """What the names depend on: number of decoder layers, shared heads, number of backbone feature maps."""

    decoder_layers: int
    share_heads: bool
    backbone_maps: int


def official(name: str, layout: Layout) -> list[str]:
    """Names in the official code's checkpoints."""
    head = re.fullmatch(r"decoder\.(class|box)_heads\.(\d+)\.(.+)", name)
    if head:
        kind = {"class": "class_embed", "box": "bbox_embed"}[head[1]]
        return [
            f"{prefix}{kind}.{layer}.{head[3]}"
            for layer in _layers_of_head(int(head[2]), layout)
            for prefix in ("transformer.decoder.", "")
        ]
    extra = re.fullmatch(r"neck\.extra_levels\.(\d+)\.(.+)", name)
    if extra:
        return [f"input_proj.{layout.backbone_maps + int(extra[1])}.{extra[2]}"]
    resnet = torchvision_resnet(name)
    return [f"backbone.0.body.{resnet}"] if resnet else [_first(name, OFFICIAL)]


def detrex(name: str, layout: Layout) -> list[str]:
    """Names in detrex's checkpoints; its encoder heads are the last of the decoder's lists."""
    head = re.fullmatch(r"decoder\.(class|box)_heads\.(\d+)\.(.+)", name)
    proposal = re.fullmatch(r"query_selection\.proposals\.(class|box)_head\.(.+)", name)
    if head or proposal:
        kind = {"class": "class_embed", "box": "bbox_embed"}[(head or proposal)[1]]
        layers = _layers_of_head(int(head[2]), layout) if head else [layout.decoder_layers]
        rest = head[3] if head else proposal[2]
        return [f"{prefix}{kind}.{layer}.{rest}" for layer in layers for prefix in ("transformer.decoder.", "")]
    return [_first(name, DETREX)]


def mmdet(name: str, layout: Layout) -> list[str]:
    """Names in MMDetection's checkpoints; its encoder heads are the last of the decoder's lists."""
    head = re.fullmatch(r"decoder\.(class|box)_heads\.(\d+)\.(.+)", name)
    proposal = re.fullmatch(r"query_selection\.proposals\.(class|box)_head\.(.+)", name)
    if head or proposal:
        layers = _layers_of_head(int(head[2]), layout) if head else [layout.decoder_layers]
        rest = head[3] if head else proposal[2]
        if (head or proposal)[1] == "class":
            return [f"bbox_head.cls_branches.{layer}.{rest}" for layer in layers]
        # linear, ReLU, linear, ReLU, linear
        rest = re.sub(r"layers\.(\d)", lambda m: str(2 * int(m[1])), rest)
        return [f"bbox_head.reg_branches.{layer}.{rest}" for layer in layers]
    resnet = torchvision_resnet(name)
    return [f"backbone.{resnet}"] if resnet else [_first(name, MMDET)]


SOURCES: dict[str, Callable[[str, Layout], list[str]]] = {"official": official, "detrex": detrex, "mmdet": mmdet}

# A parameter name that identifies each source.
MARKS = {
    "official": "transformer.encoder.layers.0.self_attn.value_proj.weight",
    "detrex": "transformer.encoder.layers.0.attentions.0.value_proj.weight",
    "mmdet": "bbox_head.cls_branches.0.weight",
}

OFFICIAL: Rules = [
    (r"encoder\.level_embed", "transformer.level_embed"),
    (r"encoder\.layers\.(\d+)\.self_attn_norm\.(.+)", r"transformer.encoder.layers.\1.norm1.\2"),
    (r"encoder\.layers\.(\d+)\.ffn\.norm\.(.+)", r"transformer.encoder.layers.\1.norm2.\2"),
    # Numbered in order of definition, not of application.
    (r"decoder\.layers\.(\d+)\.self_attn_norm\.(.+)", r"transformer.decoder.layers.\1.norm2.\2"),
    (r"decoder\.layers\.(\d+)\.cross_attn_norm\.(.+)", r"transformer.decoder.layers.\1.norm1.\2"),
    (r"decoder\.layers\.(\d+)\.ffn\.norm\.(.+)", r"transformer.decoder.layers.\1.norm3.\2"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.(.+)", r"transformer.\1.layers.\2.\3"),
    (r"decoder\.query_position\.(.+)", r"transformer.decoder.ref_point_head.\1"),
    (r"(encoder|decoder)\.(.+)", r"transformer.\1.\2"),
    (r"query_selection\.content\.(.+)", r"transformer.tgt_embed.\1"),
    (r"query_selection\.anchor_logits\.(.+)", r"transformer.refpoint_embed.\1"),
    (r"query_selection\.proposals\.project\.(.+)", r"transformer.enc_output.\1"),
    (r"query_selection\.proposals\.norm\.(.+)", r"transformer.enc_output_norm.\1"),
    (r"query_selection\.proposals\.class_head\.(.+)", r"transformer.enc_out_class_embed.\1"),
    (r"query_selection\.proposals\.box_head\.(.+)", r"transformer.enc_out_bbox_embed.\1"),
    (r"denoising\.label_embed\.(.+)", r"label_enc.\1"),
    (r"neck\.projections\.(.+)", r"input_proj.\1"),
    (r"backbone\.(.+)", r"backbone.0.\1"),
]

_NECK: Rules = [
    (r"neck\.projections\.(\d+)\.0\.(.+)", r"neck.convs.\1.conv.\2"),
    (r"neck\.extra_levels\.(\d+)\.0\.(.+)", r"neck.extra_convs.\1.conv.\2"),
]

_CONVNEXT: Rules = [  # timm's ConvNeXt under detrex's names, which are its authors'
    (r"backbone\.body\.stem_(\d)\.(.+)", r"backbone.downsample_layers.0.\1.\2"),
    (r"backbone\.body\.stages_(\d)\.downsample\.(.+)", r"backbone.downsample_layers.\1.\2"),
    (r"backbone\.body\.stages_(\d)\.blocks\.(\d+)\.conv_dw\.(.+)", r"backbone.stages.\1.\2.dwconv.\3"),
    (r"backbone\.body\.stages_(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.(.+)", r"backbone.stages.\1.\2.pwconv\3.\4"),
    (r"backbone\.body\.stages_(\d)\.blocks\.(.+)", r"backbone.stages.\1.\2"),
    (r"backbone\.norms\.stage(\d)\.(.+)", r"backbone.norm\1.\2"),
]

DETREX: Rules = [
    (r"encoder\.level_embed", "transformer.level_embeds"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(.+)", r"transformer.encoder.layers.\1.attentions.0.\2"),
    (r"decoder\.layers\.(\d+)\.self_attn\.(.+)", r"transformer.decoder.layers.\1.attentions.0.attn.\2"),
    (r"decoder\.layers\.(\d+)\.cross_attn\.(.+)", r"transformer.decoder.layers.\1.attentions.1.\2"),
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn_norm\.(.+)", r"transformer.\1.layers.\2.norms.0.\3"),
    (r"encoder\.layers\.(\d+)\.ffn\.norm\.(.+)", r"transformer.encoder.layers.\1.norms.1.\2"),
    (r"decoder\.layers\.(\d+)\.cross_attn_norm\.(.+)", r"transformer.decoder.layers.\1.norms.1.\2"),
    (r"decoder\.layers\.(\d+)\.ffn\.norm\.(.+)", r"transformer.decoder.layers.\1.norms.2.\2"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.linear1\.(.+)", r"transformer.\1.layers.\2.ffns.0.layers.0.0.\3"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.linear2\.(.+)", r"transformer.\1.layers.\2.ffns.0.layers.1.\3"),
    *_NECK,
    (r"neck\.projections\.(\d+)\.1\.(.+)", r"neck.convs.\1.norm.\2"),
    (r"neck\.extra_levels\.(\d+)\.1\.(.+)", r"neck.extra_convs.\1.norm.\2"),
    *_CONVNEXT,
    (r"(backbone\..+)", r"\1"),
    *OFFICIAL,
]

MMDET: Rules = [
    (r"encoder\.level_embed", "level_embed"),
    (r"decoder\.layers\.(\d+)\.self_attn\.(.+)", r"decoder.layers.\1.self_attn.attn.\2"),
    (r"(encoder|decoder)\.layers\.(\d+)\.self_attn_norm\.(.+)", r"\1.layers.\2.norms.0.\3"),
    (r"encoder\.layers\.(\d+)\.ffn\.norm\.(.+)", r"encoder.layers.\1.norms.1.\2"),
    (r"decoder\.layers\.(\d+)\.cross_attn_norm\.(.+)", r"decoder.layers.\1.norms.1.\2"),
    (r"decoder\.layers\.(\d+)\.ffn\.norm\.(.+)", r"decoder.layers.\1.norms.2.\2"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.linear1\.(.+)", r"\1.layers.\2.ffn.layers.0.0.\3"),
    (r"(encoder|decoder)\.layers\.(\d+)\.ffn\.linear2\.(.+)", r"\1.layers.\2.ffn.layers.1.\3"),
    (r"decoder\.query_position\.(.+)", r"decoder.ref_point_head.\1"),
    (r"((?:encoder|decoder)\..+)", r"\1"),
    (r"query_selection\.content\.(.+)", r"query_embedding.\1"),
    (r"query_selection\.proposals\.project\.(.+)", r"memory_trans_fc.\1"),
    (r"query_selection\.proposals\.norm\.(.+)", r"memory_trans_norm.\1"),
    (r"denoising\.label_embed\.(.+)", r"dn_query_generator.label_embedding.\1"),
    *_NECK,
    (r"neck\.projections\.(\d+)\.1\.(.+)", r"neck.convs.\1.gn.\2"),
    (r"neck\.extra_levels\.(\d+)\.1\.(.+)", r"neck.extra_convs.\1.gn.\2"),
    (r"backbone\.patch_embed\.proj\.(.+)", r"backbone.patch_embed.projection.\1"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.(.+)", r"backbone.stages.\1.blocks.\2.attn.w_msa.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.(.+)", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.(.+)", r"backbone.stages.\1.blocks.\2.ffn.layers.1.\3"),
    (r"backbone\.layers\.(.+)", r"backbone.stages.\1"),
    (r"(backbone\..+)", r"\1"),
]

_RESNET: Rules = [
    (r"backbone\.stem\.conv1\.norm\.(.+)", r"bn1.\1"),
    (r"backbone\.stem\.conv1\.(.+)", r"conv1.\1"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.(.+)", r"layer\1.\2.downsample.1.\3"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.(.+)", r"layer\1.\2.downsample.0.\3"),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)", r"layer\1.\2.bn\3.\4"),
    (r"backbone\.res(\d)\.(\d+)\.(conv\d\..+)", r"layer\1.\2.\3"),
]


def torchvision_resnet(name: str) -> str | None:
    """torchvision's name of a parameter of detectron2's ResNet; None for other parameters."""
    for pattern, replacement in _RESNET:
        if re.fullmatch(pattern, name):
            renamed = re.sub(f"^{pattern}$", replacement, name)
            return re.sub(r"^layer(\d)", lambda m: f"layer{int(m[1]) - 1}", renamed)  # their stages count from 1
    return None


def _layers_of_head(index: int, layout: Layout) -> list[int]:
    return list(range(layout.decoder_layers)) if layout.share_heads else [index]


def _first(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, name):
            return re.sub(f"^{pattern}$", replacement, name)
    raise KeyError(f"no published name is known for {name}")
