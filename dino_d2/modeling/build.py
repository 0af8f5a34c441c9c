"""Build the parts of DINO from a detectron2 config. The parts themselves do not use `cfg`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from detectron2.config import CfgNode
from torch import nn

from dino_d2.ops import ms_deform_attn_fused, ms_deform_attn_fused_reference, require_compiled

from .box_refinement import BOX_REFINEMENTS
from .criterion import LossWeights, SetCriterion
from .decoder import DecoderLayer, DINODecoder, class_head
from .deformable_attention import MultiScaleDeformableAttention
from .denoising import ContrastiveDenoising, NoDenoising, PlainDenoising
from .encoder import DeformableEncoder, EncoderLayer
from .family.iou_aware import iou_aware_loss
from .family.matchability import matchability_loss
from .family.memory_fusion import FusingEncoder
from .family.mixed_matching import MixedMatcher
from .family.position_supervised import PositionModulatedMatcher, position_supervised_loss
from .interleaved_encoder import InterleavedBlock
from .layers import FeedForward, box_head
from .losses import focal_loss
from .matcher import HungarianMatcher
from .neck import ChannelMapper
from .query_selection import EncoderProposals, MixedQuerySelection, PureQuerySelection, StaticQueries

COUNTS = (
    "NUM_CLASSES", "NUM_QUERIES", "NUM_FEATURE_LEVELS", "HIDDEN_DIM", "NHEADS", "DEC_LAYERS",
    "DIM_FEEDFORWARD", "NUM_POINTS", "INTERLEAVED.COARSE_UPDATES",
)  # fmt: skip

CLASS_LOSSES = {  # MODEL.DINO.LOSS.CLASS
    "focal": focal_loss,
    "iou_aware": iou_aware_loss,
    "position_supervised": position_supervised_loss,
    "matchability": matchability_loss,
}


def check_counts(cfg: CfgNode) -> None:
    """Raise ValueError if one of the `COUNTS` in the config is below 1, or one that may be 0 is negative."""
    for key in COUNTS:
        count = attrgetter(key)(cfg.MODEL.DINO)
        if count < 1:
            raise ValueError(f"MODEL.DINO.{key} is {count}; it must be at least 1")
    hidden = cfg.MODEL.DINO.INTERLEAVED.FINEST_FEEDFORWARD
    if hidden < 0:
        raise ValueError(f"MODEL.DINO.INTERLEAVED.FINEST_FEEDFORWARD is {hidden}; it must be at least 0")


def build_neck(cfg: CfgNode, in_channels: Sequence[int]) -> ChannelMapper:
    return ChannelMapper(in_channels, cfg.MODEL.DINO.HIDDEN_DIM, cfg.MODEL.DINO.NUM_FEATURE_LEVELS)


def build_encoder(cfg: CfgNode, strides: Sequence[int] = ()) -> DeformableEncoder:
    """
    Args:
        strides: of the backbone's maps, for `MODEL.DINO.EXACT_POSITIONS`.
    """
    c = cfg.MODEL.DINO
    if _choice("MODEL.DINO.ENCODER", c.ENCODER, ("deformable", "interleaved")) == "deformable":
        layers = [_encoder_layer(cfg, c.DIM_FEEDFORWARD) for _ in range(c.ENC_LAYERS)]
    else:
        layers = [_interleaved_block(cfg) for _ in range(c.ENC_LAYERS)]
    _xavier(layers)
    kind = FusingEncoder if c.MEMORY_FUSION else DeformableEncoder
    return kind(
        layers,
        c.HIDDEN_DIM,
        c.NUM_FEATURE_LEVELS,
        c.POS_TEMPERATURE,
        c.POS_OFFSET,
        c.CHECKPOINT.ENCODER,
        _strides_of_levels(strides, c.NUM_FEATURE_LEVELS) if c.EXACT_POSITIONS else None,
    )


def _strides_of_levels(strides: Sequence[int], levels: int) -> list[int]:
    """Of the backbone's maps, and of the coarser ones that the neck derives from the last: twice as much each."""
    return [*strides, *(strides[-1] * 2**n for n in range(1, levels - len(strides) + 1))]


def _encoder_layer(cfg: CfgNode, dim_feedforward: int) -> EncoderLayer:
    return EncoderLayer(_deformable_attention(cfg), _ffn(cfg, dim_feedforward))


def _interleaved_block(cfg: CfgNode) -> InterleavedBlock:
    c = cfg.MODEL.DINO
    if c.NUM_FEATURE_LEVELS < 2:
        raise ValueError("MODEL.DINO.ENCODER interleaved needs at least two levels, but MODEL.DINO.NUM_FEATURE_LEVELS "
                         f"is {c.NUM_FEATURE_LEVELS}; use deformable for one level")  # fmt: skip
    coarse = [_encoder_layer(cfg, c.DIM_FEEDFORWARD) for _ in range(c.INTERLEAVED.COARSE_UPDATES)]
    hidden = c.INTERLEAVED.FINEST_FEEDFORWARD
    return InterleavedBlock(coarse, _encoder_layer(cfg, hidden) if hidden else None)


def build_query_selection(cfg: CfgNode) -> nn.Module:
    c = cfg.MODEL.DINO
    choice = _choice("MODEL.DINO.QUERY_SELECTION", c.QUERY_SELECTION, ("mixed", "pure", "static"))
    if choice == "static":
        return StaticQueries(c.NUM_QUERIES, c.HIDDEN_DIM)
    proposals = EncoderProposals(c.HIDDEN_DIM, class_head(c.HIDDEN_DIM, c.NUM_CLASSES), box_head(c.HIDDEN_DIM))
    nn.init.xavier_uniform_(proposals.project.weight)
    if choice == "pure":
        return PureQuerySelection(c.NUM_QUERIES, proposals)
    return MixedQuerySelection(c.NUM_QUERIES, c.HIDDEN_DIM, proposals)


def int8_of_config(cfg: CfgNode) -> bool:
    """Whether `TEST.QUANTIZE` asks for int8.

    Raises:
        ValueError: it is unknown, or it cannot be used with this device, with mixed precision or with this PyTorch.
    """
    if _choice("TEST.QUANTIZE", cfg.TEST.QUANTIZE, ("none", "int8")) == "none":
        return False
    obstacles = {
        f"MODEL.DEVICE is {cfg.MODEL.DEVICE}; int8 is for a CPU": torch.device(cfg.MODEL.DEVICE).type != "cpu",
        "TEST.AMP.ENABLED is True": cfg.TEST.AMP.ENABLED,
        "this PyTorch has no oneDNN": not torch.backends.mkldnn.is_available(),
    }
    for obstacle, there in obstacles.items():
        if there:
            raise ValueError(f"TEST.QUANTIZE cannot be int8, because {obstacle}. Set it to none")
    return True


def query_score_threshold(cfg: CfgNode) -> float:
    c = cfg.MODEL.DINO
    key, threshold = "MODEL.DINO.QUERY_SCORE_THRESHOLD", c.QUERY_SCORE_THRESHOLD
    if not 0 <= threshold < 1:
        raise ValueError(f"{key} is {threshold}; it must be in [0, 1); 0 disables it")
    if threshold and c.QUERY_SELECTION == "static":
        raise ValueError(f"{key} is {threshold}, but MODEL.DINO.QUERY_SELECTION static scores no tokens; set it to 0")
    return threshold


def build_decoder(cfg: CfgNode) -> DINODecoder:
    c = cfg.MODEL.DINO
    choice = _choice("MODEL.DINO.LOOK_FORWARD", c.LOOK_FORWARD, BOX_REFINEMENTS)
    layers = [
        DecoderLayer(
            nn.MultiheadAttention(c.HIDDEN_DIM, c.NHEADS, dropout=c.DROPOUT, batch_first=True),
            _deformable_attention(cfg),
            _ffn(cfg, c.DIM_FEEDFORWARD),
        )
        for _ in range(c.DEC_LAYERS)
    ]
    _xavier(layers)
    refine = BOX_REFINEMENTS[choice]
    decoder = DINODecoder(layers, c.HIDDEN_DIM, c.NUM_CLASSES, refine, c.SHARE_HEADS, c.CHECKPOINT.DECODER)
    _xavier([decoder.query_position])
    return decoder


def build_denoising(cfg: CfgNode) -> nn.Module:
    c = cfg.MODEL.DINO
    types = {"cdn": ContrastiveDenoising, "dn": PlainDenoising}
    choice = _choice("MODEL.DINO.DN.TYPE", c.DN.TYPE, (*types, "none"))
    if choice == "none":
        return NoDenoising(c.HIDDEN_DIM)
    return types[choice](
        c.NUM_CLASSES,
        c.HIDDEN_DIM,
        number=c.DN.NUMBER,
        label_noise_ratio=c.DN.LABEL_NOISE_RATIO,
        box_noise_scale=c.DN.BOX_NOISE_SCALE,
        reorder_negatives=c.DN.REORDER_NEGATIVES,
        max_queries=c.DN.MAX_QUERIES,
    )


def build_criterion(cfg: CfgNode) -> SetCriterion:
    loss = cfg.MODEL.DINO.LOSS
    class_loss = CLASS_LOSSES[_choice("MODEL.DINO.LOSS.CLASS", loss.CLASS, CLASS_LOSSES)]
    if not isinstance(loss.DN_CLASS_WEIGHT, (int, float, type(None))):
        raise ValueError(f"MODEL.DINO.LOSS.DN_CLASS_WEIGHT is {loss.DN_CLASS_WEIGHT!r}; it must be a number or None")
    weights = LossWeights(loss.CLASS_WEIGHT, loss.L1_WEIGHT, loss.GIOU_WEIGHT, loss.DN_CLASS_WEIGHT)
    return SetCriterion(build_matcher(cfg), weights, class_loss)


def build_matcher(cfg: CfgNode) -> HungarianMatcher:
    c = cfg.MODEL.DINO.MATCHER
    kind = PositionModulatedMatcher if c.POSITION_MODULATED else HungarianMatcher
    matcher = kind(c.CLASS_WEIGHT, c.L1_WEIGHT, c.GIOU_WEIGHT)
    if c.COPIES < 1:
        raise ValueError(f"MODEL.DINO.MATCHER.COPIES is {c.COPIES}; it must be at least 1")
    return matcher if c.COPIES == 1 else MixedMatcher(matcher, c.COPIES)


def _deformable_attention(cfg: CfgNode) -> MultiScaleDeformableAttention:
    c = cfg.MODEL.DINO
    choice = _choice("MODEL.DINO.OP", c.OP, ("auto", "compiled", "reference"))
    if choice == "compiled":
        require_compiled(torch.device(cfg.MODEL.DEVICE).type)
    op = ms_deform_attn_fused_reference if choice == "reference" else ms_deform_attn_fused
    return MultiScaleDeformableAttention(c.HIDDEN_DIM, c.NHEADS, c.NUM_FEATURE_LEVELS, c.NUM_POINTS, op)


def _ffn(cfg: CfgNode, hidden_dim: int) -> FeedForward:
    return FeedForward(cfg.MODEL.DINO.HIDDEN_DIM, hidden_dim, cfg.MODEL.DINO.DROPOUT)


def _xavier(modules: Sequence[nn.Module]) -> None:
    """Xavier initialisation for all matrices, then the deformable attention's own initialisation."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for part in module.modules():
            if isinstance(part, MultiScaleDeformableAttention):
                part.reset_parameters()


def _choice(key: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(allowed)}")
    return value
