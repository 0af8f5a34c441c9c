"""Weights of other programs to ours, whoever's they are."""

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
        published: as `read_published` gives it.
        source: official, detrex, mmdet; backbone for ImageNet weights alone; auto: what the names say.
        model: made from the config that the weights are to be used with.

    Raises:
        ConversionError: the weights do not fit the model, or are nobody's that is known.
    """
    state = published.state
    if source == "backbone" or (source == "auto" and is_backbone(state)):
        return from_backbone(state, model)
    return from_published(state, detect_source(state) if source == "auto" else source, model, published.config)
