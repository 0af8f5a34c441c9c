"""A file from the web: in one piece, whole or not at all, going on where an earlier attempt stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

ATTEMPTS = 5  # in a row that bring nothing new, before it is given up
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20
RECORD = "sha256.json"  # in the folder: URL -> digest of what was first loaded from it


class DownloadError(OSError):
    """What could not be had, and what can be done about it."""


def download(url: str, path: Path, sha256: str) -> None:
    """Write what `url` holds to `path`.

    A part that an earlier attempt left is gone on with. The caller sees to it that there is one attempt at a time.

    Args:
        sha256: what the file's digest begins with; empty: not known, then the first download's is recorded in the
            folder of `path`, and later ones must have the same.

    Raises:
        DownloadError: the server cannot be reached or has no such file, the disk is full, or the file is another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    in_vain = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(url, part)
            break
        except urllib.error.HTTPError as error:
            raise DownloadError(f"{url}: the server says {error.code} {error.reason}") from error
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            now = part.stat().st_size if part.exists() else 0
            in_vain = 0 if now > before else in_vain + 1
            if in_vain == ATTEMPTS or not now:
                kept = f"; {now / 1e6:.0f} MB are kept, and the next attempt goes on from there" if now else ""
                raise DownloadError(f"{url} could not be loaded: {error}{kept}") from error
        except OSError as error:
            free = shutil.disk_usage(part.parent).free / 1e6
            raise DownloadError(f"{part} could not be written ({free:.0f} MB are free there): {error}") from error
    digest = file_digest(part)
    expected = sha256 or _recorded(path.parent).get(url, "")
    if not digest.startswith(expected):
        part.unlink()
        raise DownloadError(
            f"{url} is another file than it was: its SHA-256 is {digest}, it should begin with {expected}. "
            "It was removed" + ("" if sha256 else f"; if the publisher has replaced it, remove {path.parent / RECORD}")
        )
    _record(path.parent, url, digest)
    part.replace(path)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        state = hashlib.sha256()
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _append(url: str, part: Path) -> None:
    """Load what is missing; `ConnectionError` if the server closes before the end."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing, or the part is of another file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise ConnectionError(f"a part of {have} bytes does not fit the server's file") from error
        raise
    with response:
        goes_on = response.status == 206
        have = have if goes_on else 0  # a server that cannot go on sends everything
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise OSError(f"{(total - have) / 1e6:.0f} MB are needed")
        with (
            part.open("ab" if goes_on else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part")) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise ConnectionError(f"the connection was closed after {part.stat().st_size} of {total} bytes")


def _recorded(folder: Path) -> dict[str, str]:
    record = folder / RECORD
    return json.loads(record.read_text()) if record.exists() else {}


def _record(folder: Path, url: str, digest: str) -> None:
    temporary = folder / f"{RECORD}.part"
    temporary.write_text(json.dumps(_recorded(folder) | {url: digest}, indent=1))
    temporary.replace(folder / RECORD)
