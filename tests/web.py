"""A web server on the loopback interface that fails as servers do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Web:
    """files: path -> bytes. cut_after: of each answer, so many bytes are sent; None: all. goes_on: it knows ranges.

    headers: sent with every answer. requests: of each request its path and its Range.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: int | None = None
    goes_on: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Web]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            web.requests.append((self.path, wanted))
            content = web.files.get(self.path)
            if content is None:
                self.send_response(404)
                self._end_headers(0)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and web.goes_on else 0
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self._end_headers(0)
                return
            self.send_response(206 if start else 200)
            self._end_headers(len(content) - start)
            if self.command == "GET":
                self.wfile.write(content[start:][: web.cut_after])

        do_HEAD = do_GET

        def _end_headers(self, length: int) -> None:
            own = {"Content-Length": str(length), "ETag": f'"{hash(self.path)}"'}
            for name, value in (web.headers | own).items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
