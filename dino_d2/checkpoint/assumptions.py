"""What weights assume beyond their shapes, stored inside the state dict.

fvcore's checkpointer keeps only tensors, and drops those whose shape differs from the model's. So the assumptions are
JSON in a byte tensor of fixed size, which `DINO` returns as its extra state.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace

import torch
from detectron2.config import CfgNode
from torch import Tensor

from dino_d2.data import class_names

CAPACITY = 1 << 16  # bytes; the names of the 1203 classes of LVIS take a third of it
EXTRA_STATE = "_extra_state"
NOT_COMPARED = ("zoo_name", "score_threshold")


@dataclass(frozen=True)
class Assumptions:
    """Facts that a model and its weights must agree on.

    class_names: in the order of the class logits; empty if unknown.
    share_heads: whether all decoder layers share one class and one box head.
    position_temperature, position_offset: of the sine position embedding.
    pixel_format: RGB or BGR; pixel_mean, pixel_std: per channel.
    encoder: deformable (also in checkpoints that predate this field) or interleaved; empty: weights without encoder.
    num_classes: number of class logits; None if unknown, in older checkpoints without names.
    memory_fusion: whether the encoder combines the outputs of all its layers; None: weights without encoder.
    exact_positions: whether tokens are placed by their strides; None: weights without encoder.
    zoo_name: name of the weights in `model_zoo`, or empty. Not compared.
    score_threshold: with the highest F1 when the weights were evaluated; None if they were not. Not compared.
    """

    class_names: tuple[str, ...]
    share_heads: bool
    position_temperature: float
    position_offset: float
    pixel_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    encoder: str = "deformable"
    num_classes: int | None = None
    memory_fusion: bool | None = False
    exact_positions: bool | None = False
    zoo_name: str = ""
    score_threshold: float | None = None

    @classmethod
    def of_config(cls, cfg: CfgNode) -> Assumptions:
        """The config's assumptions. Class names are the config's, else its dataset's if their number matches.

        Raises:
            ValueError: the wrong number of class names, or duplicates.
        """
        c = cfg.MODEL.DINO
        return cls(
            class_names=_class_names(cfg),
            share_heads=c.SHARE_HEADS,
            position_temperature=float(c.POS_TEMPERATURE),
            position_offset=float(c.POS_OFFSET),
            pixel_format=cfg.INPUT.FORMAT,
            pixel_mean=tuple(float(x) for x in cfg.MODEL.PIXEL_MEAN),
            pixel_std=tuple(float(x) for x in cfg.MODEL.PIXEL_STD),
            encoder=c.ENCODER,
            num_classes=c.NUM_CLASSES,
            memory_fusion=c.MEMORY_FUSION,
            exact_positions=c.EXACT_POSITIONS,
        )

    def to_tensor(self) -> Tensor:
        """Encode as uint8 (CAPACITY,), JSON padded with zeros. Class names that do not fit are left out."""
        facts = asdict(self)
        text = json.dumps(facts).encode()
        if len(text) > CAPACITY:
            text = json.dumps(facts | {"class_names": ()}).encode()
        padded = torch.zeros(CAPACITY, dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return padded

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Assumptions:
        """Decode what :meth:`to_tensor` returned, also in older versions.

        Raises:
            ValueError: it has facts that only newer versions know.
        """
        facts = json.loads(bytes(tensor.cpu().numpy()).rstrip(b"\0"))
        unknown = facts.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                "the weights were saved by a newer version of dino_d2: unknown "
                f"{', '.join(sorted(unknown))}. Update dino_d2 to load them"
            )
        read = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()})
        return read if read.num_classes else replace(read, num_classes=len(read.class_names) or None)

    def contradictions(self, other: Assumptions) -> list[str]:
        """One line for each fact in which `other` (of a checkpoint) differs, with the config key to change.

        `DINOCheckpointer` has already copied class rows by name and updated the class names when this is called. Other
        checkpointers, such as `DefaultPredictor`'s, would leave the class heads random or scramble them.
        """
        lines = []
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            unknown = (field.name == "encoder" and not theirs) or theirs is None
            other_number = field.name == "class_names" and len(ours) != len(theirs)  # num_classes reports it
            if ours == theirs or unknown or other_number or field.name in NOT_COMPARED:
                continue
            if field.name == "num_classes":
                lines.append(
                    f"MODEL.DINO.NUM_CLASSES is {ours}, the weights are for {theirs}: set it to {theirs}, or load them "
                    "with dino_d2.checkpoint.DINOCheckpointer, as tools/train_net.py does, to copy classes by name"
                )
            else:
                lines.append(f"{CONFIG_KEYS[field.name]} is {_short(ours)}, the weights are for {_short(theirs)}")
        if lines and other.zoo_name:
            lines.append(f"use their config: dino_d2.model_zoo.get_config({other.zoo_name!r}, trained=True)")
        return lines


CONFIG_KEYS = {
    "class_names": "MODEL.DINO.CLASS_NAMES",
    "share_heads": "MODEL.DINO.SHARE_HEADS",
    "position_temperature": "MODEL.DINO.POS_TEMPERATURE",
    "position_offset": "MODEL.DINO.POS_OFFSET",
    "pixel_format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "encoder": "MODEL.DINO.ENCODER",
    "memory_fusion": "MODEL.DINO.MEMORY_FUSION",
    "exact_positions": "MODEL.DINO.EXACT_POSITIONS",
}


def _class_names(cfg: CfgNode) -> tuple[str, ...]:
    names, number = tuple(class_names(cfg)), cfg.MODEL.DINO.NUM_CLASSES
    repeated = sorted({name for name in names if names.count(name) > 1})
    if cfg.MODEL.DINO.CLASS_NAMES and (len(names) != number or repeated):
        raise ValueError(
            f"MODEL.DINO.CLASS_NAMES has {len(names)} names"
            + (f" ({', '.join(repeated)} more than once)" if repeated else "")
            + f", but MODEL.DINO.NUM_CLASSES is {number}: give each class a different name, or leave all names out"
        )
    return names if len(names) == number and not repeated else ()


def _short(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 6:
        return f"{len(value)} names ({', '.join(map(str, value[:3]))}, …)"
    return str(list(value)) if isinstance(value, tuple) else str(value)
