"""Backbones that freeze nothing."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode

BASE = 2  # the value that every recipe inherits

logger = logging.getLogger(__name__)


def warn_of_freezing(cfg: CfgNode) -> None:
    """Log a warning if `MODEL.BACKBONE.FREEZE_AT` was chosen for a backbone that is always trained whole."""
    backbone = cfg.MODEL.BACKBONE
    if backbone.FREEZE_AT not in (0, BASE):
        logger.warning(
            "MODEL.BACKBONE.FREEZE_AT is %s, but %s freezes nothing: all of it is trained. "
            "SOLVER.BACKBONE_MULTIPLIER is its share of the learning rate",
            backbone.FREEZE_AT,
            backbone.NAME,
        )
