"""Multi-scale deformable attention: compiled kernels with a plain PyTorch fallback and reference."""

from .functional import ms_deform_attn, ms_deform_attn_fused
from .library import compiled, require_compiled
from .reference import (
    attention_weights_of,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
    sampling_locations_of,
)

__all__ = [
    "attention_weights_of",
    "compiled",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_reference",
    "ms_deform_attn_reference",
    "require_compiled",
    "sampling_locations_of",
]
