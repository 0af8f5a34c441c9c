"""Convert weights from any supported source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .backbone import from_backbone, is_backbone
from .convert import Conversion, detect_source, from_published
from .files import PublishedFile

if TYPE_CHECKING:  # the model imports this package
    from dino_d2.meta_arch import DINO


def to_ours(published: PublishedFile, source: str, model: DINO) -> Conversion:
    """The state dict of `model` with the values of a published checkpoint.

    Args:
        published: from `read_published`.
        source: official, detrex, mmdet; backbone for ImageNet weights; auto: detect from the parameter names.
        model: built from the config that will use the weights.

    Raises:
        ConversionError: the weights do not match the model, or their source is unknown.
    """
    state = published.state
    if source == "backbone" or (source == "auto" and is_backbone(state)):
        return from_backbone(state, model)
    return from_published(state, detect_source(state) if source == "auto" else source, model, published.config)
