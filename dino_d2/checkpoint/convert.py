"""Convert published checkpoints to ours and back, accounting for every tensor. Names are mapped in `names.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from .assumptions import EXTRA_STATE, Assumptions
from .names import MARKS, SOURCES, Layout

if TYPE_CHECKING:  # the model imports this package
    from dino_d2.meta_arch import DINO

COCO = sorted((c for c in COCO_CATEGORIES if c["isthing"]), key=lambda c: c["id"])
COCO_RAW_CLASSES = 91  # rows by raw category id, 0 to 90, as the official code has them

# Temperature and offset of the sine position embedding in each source's weights; shapes do not reveal them.
# MMDetection's "improved" R-50 uses detrex's, its others the official code's.
POSITIONS = {
    "official": ((20.0, 0.0),),
    "detrex": ((10000.0, -0.5),),
    "mmdet": ((20.0, 0.0), (10000.0, -0.5)),
}
PIXELS = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

DERIVED = ("relative_position_index", "num_batches_tracked")  # computed, never loaded
OPTIONAL = (  # not used by every config
    "denoising.label_embed.weight",
    "query_selection.content.weight",
    "query_selection.anchor_logits.weight",
    *(f"query_selection.proposals.{m}.{p}" for m in ("project", "norm", "class_head") for p in ("weight", "bias")),
    *(f"query_selection.proposals.box_head.layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")),
)


class ConversionError(ValueError):
    """The checkpoint does not match the config; the message lists every name."""


@dataclass
class Conversion:
    """A converted state dict, and notes on how it was made."""

    state: dict[str, Tensor]
    notes: list[str]


def detect_source(state: Mapping[str, Tensor]) -> str:
    """official, detrex or mmdet, from the parameter names of a checkpoint."""
    for source, mark in MARKS.items():
        if mark in state:
            return source
    raise ConversionError(
        "This is not a known DINO checkpoint (official, detrex, mmdet): it has none of " + ", ".join(MARKS.values())
    )


def from_published(state: Mapping[str, Tensor], source: str, model: DINO, config: str = "") -> Conversion:
    """The state dict of `model` with the values of a published checkpoint.

    Args:
        state: as read from the file.
        source: official, detrex or mmdet.
        model: built from the config that will use the weights.
        config: text of the config inside the file, if any (MMDetection). It decides between position embeddings that
            the weights allow; without it the config of `model` does.

    Raises:
        ConversionError: unexpected or missing names, different shapes, or a config that does not match the source.
    """
    layout = layout_of(model)
    positions = _positions(source, config)
    assumptions = _assumptions(source, model, state, positions)
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    notes, missing, wrong = [], [], []
    if len(positions) > 1:
        notes.append(
            f"position embedding: temperature {assumptions.position_temperature}, offset "
            f"{assumptions.position_offset}, from the config; the checkpoint does not specify them"
        )
    for name, own in model.state_dict().items():
        if name == EXTRA_STATE:
            continue
        names = SOURCES[source](name, layout)
        present = [n for n in names if n in state]
        used.update(present)
        if name.endswith(DERIVED):
            result[name] = own.clone()
            continue
        if not present:
            default = _default(name, own, source)
            if default is None:
                missing.append(f"{names[0]} (for {name})")
            else:
                result[name] = default
                notes.append(f"{name}: not in the checkpoint, set to zero")
            continue
        value = state[present[0]]
        if any(not torch.equal(value, state[n]) for n in present[1:]):
            wrong.append(f"{', '.join(present)} differ: the heads are not shared, set MODEL.DINO.SHARE_HEADS False")
            continue
        value, note = _adapt(name, value, own, source)
        if value.shape != own.shape:
            wrong.append(f"{present[0]} is {tuple(state[present[0]].shape)}, {name} is {tuple(own.shape)}")
            continue
        notes += [f"{name}: {note}"] if note else []
        result[name] = value.clone()
    unused = {n for name in OPTIONAL if _known(name, source) for n in SOURCES[source](name, layout)} - used
    unexpected = []
    for name in sorted(set(state) - used):
        if name.endswith(DERIVED):
            notes.append(f"{name}: derived, ignored")
        elif name in unused:
            notes.append(f"{name}: not used by this config, ignored")
        else:
            unexpected.append(name)
    problems = [("unexpected", unexpected), ("missing", missing), ("mismatch", wrong)]
    lines = [f"{what}: {item}" for what, items in problems for item in items]
    if lines:
        raise ConversionError(f"This {source} checkpoint does not match the config:\n  " + "\n  ".join(lines))
    result[EXTRA_STATE] = assumptions.to_tensor()
    return Conversion(result, notes)


def to_published(state: Mapping[str, Tensor], source: str, model: DINO) -> Conversion:
    """Convert a state dict of `model` to the names of `source` (official).

    Raises:
        ConversionError: unexpected or missing names in the state dict, or an encoder that the source does not have.
    """
    if model.assumptions.encoder != "deformable":
        raise ConversionError(f"MODEL.DINO.ENCODER is {model.assumptions.encoder}, which {source} does not have")
    if model.assumptions.memory_fusion:
        raise ConversionError(f"MODEL.DINO.MEMORY_FUSION is True, which {source} does not have")
    if model.assumptions.exact_positions:
        raise ConversionError(f"MODEL.DINO.EXACT_POSITIONS is True, which {source} does not have")
    layout = layout_of(model)
    expected = set(model.state_dict()) - {EXTRA_STATE}
    given = set(state) - {EXTRA_STATE}
    lines = [f"unexpected: {n}" for n in sorted(given - expected)] + [f"missing: {n}" for n in sorted(expected - given)]
    if lines:
        raise ConversionError("This checkpoint does not match the config:\n  " + "\n  ".join(lines))
    notes = []
    if EXTRA_STATE in state:
        model.set_extra_state(state[EXTRA_STATE])
        threshold = model.assumptions.score_threshold
        notes += (
            [] if threshold is None else [f"score threshold {threshold:.3f}: {source} weights have no place for it"]
        )
    result = {n: state[name] for name in sorted(given) for n in SOURCES[source](name, layout)}
    return Conversion(result, notes)


def layout_of(model: DINO) -> Layout:
    return Layout(len(model.decoder.layers), model.assumptions.share_heads, len(model.neck.projections))


def _positions(source: str, config: str) -> tuple[tuple[float, float], ...]:
    """The temperatures and offsets possible for the weights; a single one if their own config gives it."""
    encoding = re.search(r"positional_encoding\s*=\s*dict\(([^()]*)\)", config) if source == "mmdet" else None
    if encoding is None:
        return POSITIONS[source]
    numbers = dict(re.findall(r"(temperature|offset)\s*=\s*([-+.\deE]+)", encoding[1]))
    return ((float(numbers.get("temperature", 10000)), float(numbers.get("offset", 0))),)  # MMDetection's defaults


def _assumptions(
    source: str, model: DINO, state: Mapping[str, Tensor], positions: Sequence[tuple[float, float]]
) -> Assumptions:
    """The assumptions of the converted weights; an error if they contradict the config."""
    ours = model.assumptions
    own_position = (ours.position_temperature, ours.position_offset)
    temperature, offset = own_position if own_position in positions else positions[0]
    pixel_format, mean, std = PIXELS
    theirs = replace(
        ours, position_temperature=temperature, position_offset=offset, pixel_format=pixel_format,
        pixel_mean=mean, pixel_std=std, encoder="deformable", memory_fusion=False, exact_positions=False,
    )  # fmt: skip
    lines = ours.contradictions(theirs)
    if own_position not in positions:
        lines += [f"or MODEL.DINO.POS_TEMPERATURE {t} MODEL.DINO.POS_OFFSET {o}" for t, o in positions[1:]]
    if lines:
        raise ConversionError(f"{source} weights need another config:\n  " + "\n  ".join(lines))
    bias = state.get(SOURCES[source]("decoder.class_heads.0.bias", layout_of(model))[0])
    by_raw_id = bias is not None and len(bias) == COCO_RAW_CLASSES
    if not ours.class_names and by_raw_id and model.decoder.num_classes == len(COCO):
        theirs = replace(theirs, class_names=tuple(c["name"] for c in COCO))
    return theirs


def _known(name: str, source: str) -> bool:
    """Only the official code has learned anchors."""
    return not (name.startswith("query_selection.anchor_logits") and source != "official")


def _default(name: str, own: Tensor, source: str) -> Tensor | None:
    """Values for what a source lacks: biases that MMDetection's convolutions do not have."""
    if source == "mmdet" and name.startswith("neck.") and name.endswith(".0.bias"):
        return torch.zeros_like(own)
    return None


def _adapt(name: str, value: Tensor, own: Tensor, source: str) -> tuple[Tensor, str]:
    """Convert rows to our number and order. Returns the tensor and a note on what was done, possibly empty."""
    if "class_head" in name:
        return _choose_classes(value, len(own))
    if name == "denoising.label_embed.weight":
        return _label_rows(value, own)
    if name == "query_selection.content.weight" and len(value) > len(own):
        return value[: len(own)], f"the first {len(own)} of {len(value)} queries"
    if source == "mmdet" and ".downsample." in name and name.startswith("backbone.layers."):
        return _swin_merge_order(value), "pixels of a merged patch reordered"
    return value, ""


def _choose_classes(value: Tensor, classes: int) -> tuple[Tensor, str]:
    """Map rows indexed by raw COCO category id to the 80 contiguous classes; otherwise keep every row."""
    if len(value) == COCO_RAW_CLASSES and classes == len(COCO):
        return value[[c["id"] for c in COCO]], "80 of 91 rows, chosen by COCO category id"
    return value, ""


def _label_rows(value: Tensor, own: Tensor) -> tuple[Tensor, str]:
    """`own` has one row per class and an unused one, which a source may lack."""
    classes = len(own) - 1
    if len(value) == COCO_RAW_CLASSES + 1 and classes == len(COCO):
        rows = [*(c["id"] for c in COCO), COCO_RAW_CLASSES]
        return value[rows], "80 of 91 rows, chosen by COCO category id, and the unused one"
    if len(value) == classes:
        return torch.cat([value, torch.zeros_like(value[:1])]), "the unused last row is zero"
    return value, ""


def _swin_merge_order(value: Tensor) -> Tensor:
    """MMDetection orders the 4 merged pixels by channel and row first, the Swin release by pixel and column first."""
    *rest, merged = value.shape
    by_pixel = value.reshape(*rest, merged // 4, 4).transpose(-1, -2)
    return by_pixel[..., [0, 2, 1, 3], :].reshape(value.shape)


def summarize(notes: Sequence[str]) -> str:
    """One line per kind of note, with an example and the count."""
    kinds: dict[str, list[str]] = {}
    for note in notes:
        name, _, what = note.partition(": ")
        kinds.setdefault(what, []).append(name)
    return "\n".join(
        f"  {what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in kinds.items()
    )
