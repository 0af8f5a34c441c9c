"""Match the classes of weights and model: by name, never by index."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .synonyms import OBJECTS365_OF_COCO

# Tensors with one row per class. The label embedding for denoising has one more, unused.
CLASS_ROWS = re.compile(
    r"(decoder\.class_heads\.\d+|query_selection\.proposals\.class_head)\.(weight|bias)|denoising\.label_embed\.weight"
)
CLASS_BIAS = "decoder.class_heads.0.bias"  # in every detector, one value per class


@dataclass(frozen=True)
class ClassMatch:
    """The row of the weights for each class of the model.

    theirs: class names of the weights; ours: class names of the model.
    rows: one per class in `ours`; None: the weights lack it.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    rows: tuple[int | None, ...]

    @property
    def new(self) -> list[str]:
        """Classes of the model that the weights lack."""
        return [name for name, row in zip(self.ours, self.rows, strict=True) if row is None]

    @property
    def dropped(self) -> list[str]:
        """Classes of the weights that the model lacks."""
        used = set(self.rows)
        return [name for row, name in enumerate(self.theirs) if row not in used]

    def copy_rows(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """`ours` (K, …) with the rows of `theirs` (J, …) for every common class.

        If there is one more row than classes, the last row is copied too.
        """
        pairs = [(target, row) for target, row in enumerate(self.rows) if row is not None]
        if len(theirs) == len(self.theirs) + 1:
            pairs.append((len(self.ours), len(self.theirs)))
        result = ours.detach().to(theirs.device, copy=True)
        targets, sources = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        result[targets] = theirs[sources].to(result.dtype)
        return result

    def table(self) -> str:
        """List the copied (old name -> new name if they differ), newly initialised and dropped classes."""
        copied = [
            name if self.theirs[row] == name else f"{self.theirs[row]} -> {name}"
            for name, row in zip(self.ours, self.rows, strict=True)
            if row is not None
        ]
        parts = (("copied", copied), ("newly initialised", self.new), ("dropped", self.dropped))
        return "\n".join(_paragraph(f"{what} ({len(names)}): ", names) for what, names in parts)


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> ClassMatch:
    """Match names: identical, then ignoring case and punctuation, then synonyms.

    Each class of the weights is used for at most one class of the model.
    """
    rows: list[int | None] = [None] * len(ours)
    spellings: tuple[Callable[[str], set[str]], ...] = (lambda name: {name}, lambda name: {plain(name)}, _synonyms)
    for spelled in spellings:
        free = {key: row for row, name in reversed([*enumerate(theirs)]) if row not in rows for key in spelled(name)}
        for i, name in enumerate(ours):
            row = next((free[key] for key in sorted(spelled(name)) if key in free), None)
            if rows[i] is None and row not in rows:
                rows[i] = row
    return ClassMatch(tuple(theirs), tuple(ours), tuple(rows))


def plain(name: str) -> str:
    """Letters and digits in lower case: "Traffic_light" and "traffic light" become equal."""
    return "".join(character for character in name.casefold() if character.isalnum())


def _synonyms(name: str) -> set[str]:
    """COCO's names for a class: "suitcase" for both "Luggage" and "suitcase"."""
    return {coco for coco, others in OBJECTS365_OF_COCO.items() if plain(name) in map(plain, (coco, *others))}


def _paragraph(title: str, names: Sequence[str]) -> str:
    return textwrap.fill(title + (", ".join(names) or "none"), 118, initial_indent="  ", subsequent_indent="    ")
