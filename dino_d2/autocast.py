"""Mixed precision, selected by the name of a dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from detectron2.config import CfgNode

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(device_type: str, dtype: str | None) -> AbstractContextManager:
    """`torch.autocast` to `dtype`; None keeps the current autocast state."""
    return nullcontext() if dtype is None else torch.autocast(device_type, DTYPES[dtype])


def autocast_of_config(key: str, amp: CfgNode) -> str | None:
    """The autocast dtype of a config node with ENABLED and DTYPE; None if it is disabled.

    Raises:
        ValueError: the dtype is not float16 or bfloat16; the message names the `key`.
    """
    if not amp.ENABLED:
        return None
    if amp.DTYPE not in DTYPES:
        raise ValueError(f"{key}.DTYPE is {amp.DTYPE!r}; it must be one of {', '.join(DTYPES)}")
    return amp.DTYPE
