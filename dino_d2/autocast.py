"""Mixed precision by the name of a dtype, in training and in evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.config import CfgNode

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(device_type: str, dtype: str | None) -> AbstractContextManager:
    """`torch.autocast` to `dtype`; None changes nothing, so that it may be on around the model."""
    return nullcontext() if dtype is None else torch.autocast(device_type, DTYPES[dtype])


def autocast_of_config(key: str, amp: CfgNode) -> str | None:
    """The dtype of a node with ENABLED and DTYPE, None where it is not enabled.

    Raises:
        ValueError: another dtype than float16 and bfloat16; it names the `key`.
    """
    if not amp.ENABLED:
        return None
    if amp.DTYPE not in DTYPES:
        raise ValueError(f"{key}.DTYPE is {amp.DTYPE!r}; it must be one of {', '.join(DTYPES)}")
    return amp.DTYPE
