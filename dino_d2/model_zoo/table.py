"""The published checkpoints listed in zoo.yaml."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

MIRROR = "DINO_D2_ZOO_URL"  # environment variable: a mirror that replaces the publishers' URLs


@dataclass(frozen=True)
class Entry:
    """A published checkpoint.

    name: in this zoo. recipe: its config, overridden by `settings` (KEY, VALUE, KEY, VALUE …).
    publisher, licence, backbone, pretraining: as stated by the publisher.
    ap: box AP on COCO val2017 in percent, as reported by the publisher; not measured here.
    base_url, file: its address.
    sha256: first digits of the file's digest; empty if not published.
    parameters: in millions. gflops: for one image of 800 x 1333 pixels (tools/analyze.py).
    """

    name: str
    recipe: str
    settings: tuple[Any, ...]
    publisher: str
    licence: str
    backbone: str
    pretraining: str
    ap: float
    base_url: str
    file: str
    sha256: str
    parameters: float
    gflops: float

    @property
    def url(self) -> str:
        base = os.environ.get(MIRROR) or self.base_url
        return f"{base.rstrip('/')}/{self.file}"


@cache
def entries() -> dict[str, Entry]:
    """All entries by name, in the order of zoo.yaml."""
    content = yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text())
    found = {}
    for publisher, of_publisher in content["publishers"].items():
        for name, row in content[publisher].items():
            parameters, gflops = content["costs"][row["recipe"]]
            found[name] = Entry(
                name=name,
                recipe=row["recipe"],
                settings=(*of_publisher["settings"], *row.get("settings", ())),
                publisher=publisher,
                licence=of_publisher["licence"],
                backbone=row["backbone"],
                pretraining=row["pretraining"],
                ap=row["ap"],
                base_url=of_publisher["url"],
                file=row["file"],
                sha256=row.get("sha256", ""),
                parameters=parameters,
                gflops=gflops,
            )
    return found


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ValueError: no weights are published under that name.
    """
    name = name.removesuffix(".yaml")
    entry = entries().get(name)
    if entry is None:
        near = difflib.get_close_matches(name, entries(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`dino-d2 zoo` lists them"
        raise ValueError(f"no weights are published under the name {name}; {hint}")
    return entry
