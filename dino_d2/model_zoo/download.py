"""Download a file completely or not at all, resuming earlier attempts."""

from __future__ import annotations

import hashlib
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from tqdm import tqdm

ATTEMPTS = 5  # in a row without progress before giving up
TIMEOUT = 30  # seconds without data
CHUNK = 1 << 20
RECORD = "sha256.json"  # in the folder: maps each URL to the digest of its first download


class DownloadError(OSError):
    """A download failed; the message says what to do."""


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path`, resuming a partial download.

    The caller must ensure that only one process downloads at a time.

    Args:
        sha256: first digits of the file's digest; empty if unknown: the digest of the first download is recorded in
            the folder of `path`, and later downloads must match it.

    Raises:
        DownloadError: the server cannot be reached or lacks the file, the disk is full, or the digest differs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(url, part)
            break
        except urllib.error.HTTPError as error:
            raise DownloadError(f"{url}: the server says {error.code} {error.reason}") from error
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > before else failures + 1
            if failures == ATTEMPTS or not now:
                resumable = f"; {now / 1e6:.0f} MB are kept, and the next attempt resumes there" if now else ""
                raise DownloadError(f"could not download {url}: {error}{resumable}") from error
        except OSError as error:
            free = shutil.disk_usage(part.parent).free / 1e6
            raise DownloadError(f"could not write {part} ({free:.0f} MB free there): {error}") from error
    digest = file_digest(part)
    expected = sha256 or _recorded(path.parent).get(url, "")
    if not digest.startswith(expected):
        part.unlink()
        raise DownloadError(
            f"{url} has changed: its SHA-256 is {digest}, expected {expected}…. The download was deleted"
            + ("" if sha256 else f"; if the publisher has replaced the file, delete {path.parent / RECORD}")
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
    """Download the missing bytes; `ConnectionError` if the connection breaks or closes before the end."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with _broken_connections():
            response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is complete, or of another file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise ConnectionError(f"the partial download of {have} bytes does not match the server's file") from error
        raise
    with response:
        resumes = response.status == 206
        have = have if resumes else 0  # a server that cannot resume sends everything
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        free = shutil.disk_usage(part.parent).free
        if total and total - have > free:
            raise OSError(f"{(total - have) / 1e6:.0f} MB are needed")
        with (
            part.open("ab" if resumes else "wb") as file,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name.removesuffix(".part")) as bar,
        ):
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise ConnectionError(f"the connection was closed after {part.stat().st_size} of {total} bytes")


def _read(response: HTTPResponse) -> bytes:
    with _broken_connections():
        return response.read(CHUNK)


@contextmanager
def _broken_connections() -> Iterator[None]:
    """Turn an `OSError` of the network (TLS, no route) into `ConnectionError`, to tell it from one of the disk."""
    try:
        yield
    except urllib.error.URLError:  # is one of the network
        raise
    except OSError as error:
        raise ConnectionError(str(error)) from error


def _recorded(folder: Path) -> dict[str, str]:
    record = folder / RECORD
    return json.loads(record.read_text()) if record.exists() else {}


def _record(folder: Path, url: str, digest: str) -> None:
    temporary = folder / f"{RECORD}.part"
    temporary.write_text(json.dumps(_recorded(folder) | {url: digest}, indent=1))
    temporary.replace(folder / RECORD)
