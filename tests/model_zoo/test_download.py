"""Files from the web, by servers and disks that fail."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import ssl
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_d2.model_zoo import download as module
from dino_d2.model_zoo.download import RECORD, DownloadError, download
from tests.web import Web, serve

CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as web:
        web.files["/weights.pth"] = CONTENT
        yield web


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def test_file_is_loaded_whole_and_its_digest_is_recorded(web: Web, path: Path) -> None:
    download(f"{web.url}/weights.pth", path, "")
    assert path.read_bytes() == CONTENT
    assert json.loads((path.parent / RECORD).read_text()) == {f"{web.url}/weights.pth": DIGEST}
    assert {file.name for file in path.parent.iterdir()} == {"weights.pth", RECORD}


def test_cut_connections_are_gone_on_with(web: Web, path: Path) -> None:
    web.cut_after = 40_000
    download(f"{web.url}/weights.pth", path, DIGEST[:8])
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in web.requests] == [None, "bytes=40000-", "bytes=80000-"]


@pytest.mark.parametrize(
    "error",
    [ssl.SSLError("decryption failed"), OSError(errno.ENETUNREACH, "Network is unreachable")],
    ids=["ssl", "net"],
)
def test_failing_connections_are_not_full_disks(
    web: Web, path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    read, failures = module.HTTPResponse.read, [None, error]  # the second piece fails

    def read_or_fail(response: module.HTTPResponse, size: int) -> bytes:
        if failures and (failure := failures.pop(0)):
            raise failure
        return read(response, size)

    monkeypatch.setattr(module, "CHUNK", 40_000)
    monkeypatch.setattr(module.HTTPResponse, "read", read_or_fail)
    download(f"{web.url}/weights.pth", path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in web.requests] == [None, "bytes=40000-"]

    path.unlink()
    failures.append(error)
    with pytest.raises(DownloadError, match=rf"could not download .*{error.args[-1]}"):
        download(f"{web.url}/weights.pth", path, DIGEST)


def test_server_that_knows_no_ranges_sends_everything_again(web: Web, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("weights.pth.part").write_bytes(b"an older attempt")
    web.goes_on = False
    download(f"{web.url}/weights.pth", path, DIGEST)
    assert path.read_bytes() == CONTENT


def test_part_that_is_whole_already_is_taken(web: Web, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("weights.pth.part").write_bytes(CONTENT)
    download(f"{web.url}/weights.pth", path, DIGEST)
    assert path.read_bytes() == CONTENT


def test_connection_that_brings_nothing_is_given_up_and_the_part_is_kept(web: Web, path: Path) -> None:
    path.parent.mkdir()
    part = path.with_name("weights.pth.part")
    part.write_bytes(CONTENT[:60_000])
    web.cut_after = 0
    with pytest.raises(DownloadError, match=r"closed after 60000 of 102400 bytes; 0 MB are kept"):
        download(f"{web.url}/weights.pth", path, "")
    assert part.stat().st_size == 60_000
    web.cut_after = None
    download(f"{web.url}/weights.pth", path, "")
    assert path.read_bytes() == CONTENT
    assert web.requests[-1][1] == "bytes=60000-"


def test_other_file_than_published_is_refused_and_removed(web: Web, path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"its SHA-256 is {DIGEST}, expected 01234567"):
        download(f"{web.url}/weights.pth", path, "01234567")
    assert list(path.parent.iterdir()) == []


def test_other_file_than_the_first_time_is_refused(web: Web, path: Path) -> None:
    download(f"{web.url}/weights.pth", path, "")
    path.unlink()
    web.files["/weights.pth"] = b"replaced"
    with pytest.raises(DownloadError, match=rf"expected {DIGEST}.*delete .*{RECORD}"):
        download(f"{web.url}/weights.pth", path, "")
    assert not path.exists()


def test_missing_file_is_named(web: Web, path: Path) -> None:
    with pytest.raises(DownloadError, match=r"nothing\.pth: the server says 404"):
        download(f"{web.url}/nothing.pth", path, "")


def test_missing_server_is_named(path: Path) -> None:
    with pytest.raises(DownloadError, match=r"could not download http://127\.0\.0\.1:1/weights\.pth: .*refused"):
        download("http://127.0.0.1:1/weights.pth", path, "")


def test_disk_that_is_too_small_is_found_before_it_is_full(
    web: Web, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(50_000))
    with pytest.raises(DownloadError, match=r"could not write .* \(0 MB free there\): 0 MB are needed"):
        download(f"{web.url}/weights.pth", path, "")


def test_disk_that_fills_up_is_named_and_the_part_is_kept(web: Web, path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from dino_d2.model_zoo.download import DownloadError, download\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    download(sys.argv[1], Path(sys.argv[2]), '')\n"
        "except DownloadError as error:\n"
        "    sys.exit(str(error))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, f"{web.url}/weights.pth", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, resource.getrlimit(resource.RLIMIT_FSIZE)
    assert "could not write" in result.stderr
    assert "weights.pth.part" in result.stderr
    assert not path.exists()
    assert 0 < path.with_name("weights.pth.part").stat().st_size <= 50_000
