"""The digest of a file, by which it is recognised wherever it lies."""

from __future__ import annotations

import hashlib
import os

from detectron2.utils.file_io import PathManager


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with PathManager.open(os.fspath(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
