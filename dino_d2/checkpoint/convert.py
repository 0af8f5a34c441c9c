"""Published checkpoints to ours and back (names: `names.py`; here: values, and that nothing is lost unsaid)."""

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
COCO_RAW_CLASSES = 91  # rows by raw category id, 0 to 90, as the published program has them

# Temperatures and offsets of the pixels' sine embedding that a source publishes weights for; shapes do not show them.
# MMDetection's "improved" R-50 has detrex's, its others the published program's.
POSITIONS = {
    "official": ((20.0, 0.0),),
    "detrex": ((10000.0, -0.5),),
    "mmdet": ((20.0, 0.0), (10000.0, -0.5)),
}
PIXELS = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

DERIVED = ("relative_position_index", "num_batches_tracked")  # computed, whatever a file says
OPTIONAL = (  # what a config may do without
    "denoising.label_embed.weight",
    "query_selection.content.weight",
    "query_selection.anchor_logits.weight",
    *(f"query_selection.proposals.{m}.{p}" for m in ("project", "norm", "class_head") for p in ("weight", "bias")),
    *(f"query_selection.proposals.box_head.layers.{i}.{p}" for i in range(3) for p in ("weight", "bias")),
)


class ConversionError(ValueError):
    """The checkpoint and the config do not fit; the message lists every name."""


@dataclass
class Conversion:
    """A state dict, and what a careful user wants to know about how it came about."""

    state: dict[str, Tensor]
    notes: list[str]


def detect_source(state: Mapping[str, Tensor]) -> str:
    """official, detrex or mmdet, by the names in a checkpoint."""
    for source, mark in MARKS.items():
        if mark in state:
            return source
    raise ConversionError(
        "This is none of the known DINO checkpoints (official, detrex, mmdet): it has none of "
        + ", ".join(MARKS.values())
    )


def from_published(state: Mapping[str, Tensor], source: str, model: DINO, config: str = "") -> Conversion:
    """The state dict of `model` with the values of a published checkpoint.

    Args:
        state: as read from the file.
        source: official, detrex or mmdet.
        model: made from the config that the weights are to be used with.
        config: the text of theirs, if the file has it; MMDetection's files do. Where the pixels' sine embedding can be
            one or the other, this decides, else the config of `model`.

    Raises:
        ConversionError: a name left over, missing or of another shape, or a config that contradicts the source.
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
            f"{assumptions.position_offset}, as the config says; the checkpoint does not"
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
                notes.append(f"{name}: not in the checkpoint, zero")
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
    left_over = []
    for name in sorted(set(state) - used):
        if name.endswith(DERIVED):
            notes.append(f"{name}: derived, left out")
        elif name in unused:
            notes.append(f"{name}: not used by this config, left out")
        else:
            left_over.append(name)
    problems = [("left over", left_over), ("missing", missing), ("not fitting", wrong)]
    lines = [f"{what}: {item}" for what, items in problems for item in items]
    if lines:
        raise ConversionError(f"This {source} checkpoint does not fit the config:\n  " + "\n  ".join(lines))
    result[EXTRA_STATE] = assumptions.to_tensor()
    return Conversion(result, notes)


def to_published(state: Mapping[str, Tensor], source: str, model: DINO) -> Conversion:
    """The way back: a state dict of `model` under the names of `source` (official).

    Raises:
        ConversionError: names of the state dict that the model does not have, or the other way round; an encoder that
            no published program has.
    """
    if model.assumptions.encoder != "deformable":
        raise ConversionError(f"MODEL.DINO.ENCODER is {model.assumptions.encoder}, which {source} weights cannot be")
    if model.assumptions.memory_fusion:
        raise ConversionError(f"MODEL.DINO.MEMORY_FUSION is True, which {source} weights cannot be")
    layout = layout_of(model)
    expected = set(model.state_dict()) - {EXTRA_STATE}
    given = set(state) - {EXTRA_STATE}
    lines = [f"left over: {n}" for n in sorted(given - expected)] + [f"missing: {n}" for n in sorted(expected - given)]
    if lines:
        raise ConversionError("This checkpoint does not fit the config:\n  " + "\n  ".join(lines))
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
    """The temperatures and offsets that weights can be for; one where their own config tells it."""
    encoding = re.search(r"positional_encoding\s*=\s*dict\(([^()]*)\)", config) if source == "mmdet" else None
    if encoding is None:
        return POSITIONS[source]
    numbers = dict(re.findall(r"(temperature|offset)\s*=\s*([-+.\deE]+)", encoding[1]))
    return ((float(numbers.get("temperature", 10000)), float(numbers.get("offset", 0))),)  # MMDetection's defaults


def _assumptions(
    source: str, model: DINO, state: Mapping[str, Tensor], positions: Sequence[tuple[float, float]]
) -> Assumptions:
    """What the converted weights assume; contradicting the config is an error at once."""
    ours = model.assumptions
    own_position = (ours.position_temperature, ours.position_offset)
    temperature, offset = own_position if own_position in positions else positions[0]
    pixel_format, mean, std = PIXELS
    theirs = replace(
        ours, position_temperature=temperature, position_offset=offset, pixel_format=pixel_format,
        pixel_mean=mean, pixel_std=std, encoder="deformable", memory_fusion=False,
    )  # fmt: skip
    lines = ours.contradictions(theirs)
    if own_position not in positions:
        lines += [f"or for MODEL.DINO.POS_TEMPERATURE {t} MODEL.DINO.POS_OFFSET {o}" for t, o in positions[1:]]
    if lines:
        raise ConversionError(f"{source} weights need another config:\n  " + "\n  ".join(lines))
    bias = state.get(SOURCES[source]("decoder.class_heads.0.bias", layout_of(model))[0])
    by_raw_id = bias is not None and len(bias) == COCO_RAW_CLASSES
    if not ours.class_names and by_raw_id and model.decoder.num_classes == len(COCO):
        theirs = replace(theirs, class_names=tuple(c["name"] for c in COCO))
    return theirs


def _known(name: str, source: str) -> bool:
    """Only the published program can learn its anchors."""
    return not (name.startswith("query_selection.anchor_logits") and source != "official")


def _default(name: str, own: Tensor, source: str) -> Tensor | None:
    """Values of what a source may lack: biases that MMDetection's convolutions do not have."""
    if source == "mmdet" and name.startswith("neck.") and name.endswith(".0.bias"):
        return torch.zeros_like(own)
    return None


def _adapt(name: str, value: Tensor, own: Tensor, source: str) -> tuple[Tensor, str]:
    """Bring rows into our number and order; says what was done, or nothing."""
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
    """Rows by raw COCO category id become the 80 contiguous classes; equal numbers keep every row."""
    if len(value) == COCO_RAW_CLASSES and classes == len(COCO):
        return value[[c["id"] for c in COCO]], "80 of 91 rows, chosen by COCO category id"
    return value, ""


def _label_rows(value: Tensor, own: Tensor) -> tuple[Tensor, str]:
    """`own` has a row per class and one more, never used; a source may have it or not."""
    classes = len(own) - 1
    if len(value) == COCO_RAW_CLASSES + 1 and classes == len(COCO):
        rows = [*(c["id"] for c in COCO), COCO_RAW_CLASSES]
        return value[rows], "80 of 91 rows, chosen by COCO category id, and the unused one"
    if len(value) == classes:
        return torch.cat([value, torch.zeros_like(value[:1])]), "the unused last row is zero"
    return value, ""


def _swin_merge_order(value: Tensor) -> Tensor:
    """MMDetection orders the 4 merged pixels by channel and row first, the published Swin by pixel, column first."""
    *rest, merged = value.shape
    by_pixel = value.reshape(*rest, merged // 4, 4).transpose(-1, -2)
    return by_pixel[..., [0, 2, 1, 3], :].reshape(value.shape)


def summarize(notes: Sequence[str]) -> str:
    """One line per kind of note, with how often it was made and an example."""
    kinds: dict[str, list[str]] = {}
    for note in notes:
        name, _, what = note.partition(": ")
        kinds.setdefault(what, []).append(name)
    return "\n".join(
        f"  {what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in kinds.items()
    )
