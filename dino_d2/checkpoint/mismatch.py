"""Weights that do not fit a model, and the config keys on which it depends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvcore.common.checkpoint import _IncompatibleKeys

USED_IN_INFERENCE = ("backbone.", "neck.", "encoder.", "query_selection.", "decoder.")

# The config keys for a name, of which the first pattern that fits counts.
BACKBONE = (r"backbone\.", "MODEL.BACKBONE.NAME and that backbone's keys (MODEL.RESNETS, SWIN, TIMM or VITDET)")
NECK = (r"neck\.|encoder\.level_embed", "MODEL.DINO.NUM_FEATURE_LEVELS and IN_FEATURES")
KEYS_OF_NAMES = (
    BACKBONE,
    NECK,
    (r"encoder\.layers\.\d+\.coarse", "MODEL.DINO.ENC_LAYERS and INTERLEAVED.COARSE_UPDATES"),
    (r"encoder\.layers\.\d+\.finest", "MODEL.DINO.ENC_LAYERS and INTERLEAVED.FINEST_FEEDFORWARD"),
    (r"encoder\.", "MODEL.DINO.ENC_LAYERS"),
    (r"query_selection\.", "MODEL.DINO.QUERY_SELECTION"),
    (r"decoder\.", "MODEL.DINO.DEC_LAYERS and SHARE_HEADS"),
)
KEYS_OF_SHAPES = (
    BACKBONE,
    NECK,
    (r".+\.(sampling_offsets|attention_weights)\.", "MODEL.DINO.NHEADS, NUM_POINTS and NUM_FEATURE_LEVELS"),
    (r"encoder\.layers\.\d+\.finest\..*ffn\.", "MODEL.DINO.INTERLEAVED.FINEST_FEEDFORWARD"),
    (r".+\.ffn\.", "MODEL.DINO.DIM_FEEDFORWARD"),
    (r"", "MODEL.DINO.HIDDEN_DIM"),
)


def explain_mismatch(incompatible: _IncompatibleKeys, ignored: tuple[str, ...]) -> list[str]:
    """What inference needs and the weights do not have, and what of theirs it does not use.

    Args:
        incompatible: what fvcore's checkpointer found.
        ignored: ends of names that do not count.

    Returns:
        a line for each kind of difference and each group of config keys that it may come from.
    """
    shapes = {name: f"{name} {theirs}, {ours} in the model" for name, theirs, ours in incompatible.incorrect_shapes}
    missing = set(incompatible.missing_keys) - set(shapes)

    def lines(problem: str, names: Iterable[str], table: tuple[tuple[str, str], ...]) -> list[str]:
        groups: dict[str, list[str]] = {}
        for name in names:
            if name.startswith(USED_IN_INFERENCE) and not name.endswith(ignored):
                keys = next(keys for pattern, keys in table if re.match(pattern, name))
                groups.setdefault(keys, []).append(name)
        return [
            f"{problem} ({len(found)}): {shapes.get(found[0], found[0])}{', …' if found[1:] else ''}; see {keys}"
            for keys, found in groups.items()
        ]

    return [
        *lines("not in the weights", sorted(missing), KEYS_OF_NAMES),
        *lines("of another shape in the weights", sorted(shapes), KEYS_OF_SHAPES),
        *lines("not used by the model", sorted(incompatible.unexpected_keys), KEYS_OF_NAMES),
    ]
