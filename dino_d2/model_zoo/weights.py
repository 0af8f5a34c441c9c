"""Download and convert published weights once, then read them from the cache."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock, get_cache_dir

from dino_d2.checkpoint import Assumptions, read_published, to_ours
from dino_d2.checkpoint.assumptions import EXTRA_STATE
from dino_d2.checkpoint.files import write_checkpoint
from dino_d2.config import load_config

from .download import DownloadError, download
from .table import MIRROR, Entry, find

PREFIX = "dino://"
CACHE = "DINO_D2_CACHE"  # environment variable
CONVERSION = "converted-1"  # increase the number when the conversion changes


def cache_folder() -> Path:
    """The folder `DINO_D2_CACHE`, by default "dino_d2" beside detectron2's cache."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path(get_cache_dir()).parent / "dino_d2"


def cached_file(entry: Entry) -> Path:
    """Path of the converted weights, whether or not it exists."""
    return cache_folder() / CONVERSION / f"{entry.name}.pth"


def published_file(entry: Entry) -> Path:
    """Path of the publisher's file. If it exists it is not downloaded: put it there by hand without a network."""
    return cache_folder() / "published" / entry.name / Path(entry.file).name


def local_weights(name: str) -> str:
    """The path of the converted weights, downloading and converting them if necessary.

    Raises:
        ValueError: no weights of that name, or their file is not the published one.
        DownloadError: the download failed.
    """
    entry = find(name)
    converted = cached_file(entry)
    if converted.exists():
        return str(converted)
    with file_lock(str(converted)):  # only one process downloads
        if not converted.exists():
            published = published_file(entry)
            by_hand = published.exists()
            if not by_hand:
                _download(entry, published)
            _convert(entry, published, converted)
            if not by_hand:
                published.unlink()
    return str(converted)


def downloaded(url: str) -> str:
    """The path of a file from the web, downloaded into the cache if needed. Each URL has a folder of its own."""
    path = cache_folder() / "urls" / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(urlsplit(url).path).name
    with file_lock(str(path)):
        if not path.exists():
            download(url, path, "")
    return str(path)


def _download(entry: Entry, published: Path) -> None:
    logging.getLogger(__name__).info("downloading %s (published by %s) from %s", entry.name, entry.publisher, entry.url)
    try:
        download(entry.url, published, entry.sha256)
    except DownloadError as error:
        raise DownloadError(
            f"{error}\nWithout a network, download {Path(entry.file).name} from {entry.url} elsewhere and copy it to "
            f"{published}, or set {MIRROR} to a mirror"
        ) from error


def _convert(entry: Entry, published: Path, converted: Path) -> None:
    without_weights = ["MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", False, "MODEL.DEVICE", "cpu"]
    cfg = load_config(entry.recipe, [*entry.settings, *without_weights])
    try:
        conversion = to_ours(read_published(published), "auto", build_model(cfg))
    except ValueError as error:
        raise ValueError(f"{published} is not the file published as {entry.name}: {error}") from error
    state = conversion.state
    assumptions = replace(Assumptions.from_tensor(state[EXTRA_STATE]), zoo_name=entry.name)
    write_checkpoint({"model": state | {EXTRA_STATE: assumptions.to_tensor()}}, converted.parent, converted.name)


class ZooHandler(PathHandler):
    """Resolves `dino://NAME` for everything that reads weights through iopath, as detectron2 does."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return local_weights(path.removeprefix(PREFIX))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return True


def register() -> None:
    PathManager.register_handler(ZooHandler(), allow_override=True)
