"""Shared by the data tests: a private cache, real data if they are here, and a loopback file server."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neurocl.data import transfer
from neurocl.data.sources import SOURCES, RemoteFile, Source


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees, or writes into, the folders of whoever runs it."""
    monkeypatch.setenv("NEUROCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEUROCL_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


_REAL_DATA = os.environ.get("NEUROCL_DATA")


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """A function from a file below the real data folder to its path; skips the test where it is absent."""

    def find(relative: str) -> Path:
        if not _REAL_DATA:
            pytest.skip("NEUROCL_DATA is not set")
        path = Path(_REAL_DATA) / relative
        if not path.exists():
            pytest.skip(f"{relative} is not under NEUROCL_DATA")
        return path

    return find


@dataclass
class Site:
    """What the loopback server holds and how it misbehaves.

    Attributes:
        files: body of each path, such as ``"/toy.bin"``.
        etag: validator it sends, None for none.
        ranges: whether it honours Range.
        cuts: for each coming answer, after how many bytes the connection breaks (None: not at all).
        statuses: status codes of the coming answers, before normal service begins.
        requests: path and headers of every request, in order.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    ranges: bool = True
    cuts: list[int | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def register_file(self, body: bytes, name: str = "toy.bin", **options: object) -> RemoteFile:
        """A registered file whose digest is that of ``body``, served or not."""
        facts: dict[str, object] = {
            "urls": (f"{self.url}/{name}",),
            "num_bytes": len(body),
            "digest": f"sha256:{hashlib.sha256(body).hexdigest()}",
        }
        return RemoteFile(name, **(facts | options))  # type: ignore[arg-type]


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            site.requests.append((self.path, dict(self.headers)))
            if site.statuses:
                self.send_error(site.statuses.pop(0))
                return
            if self.path not in site.files:
                self.send_error(404)
                return
            body, start, status = site.files[self.path], 0, 200
            asked = self.headers.get("Range", "")
            if site.ranges and asked and self.headers.get("If-Range") == site.etag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                status = 206 if start < len(body) else 416
            self.send_response(status)
            if status == 416:
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            if site.etag:
                self.send_header("ETag", site.etag)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut = site.cuts.pop(0) if site.cuts else None
            self.wfile.write(body[start:] if cut is None else body[start : start + cut])
            self.close_connection = True

    return Handler


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A loopback file server; retries do not wait."""
    monkeypatch.setattr(transfer, "RETRY_WAITS", (0.0,) * 5)
    described = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(described))
    described.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield described
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Source]:
    """A function that registers the set ``toy`` made of the given files."""

    def put(*files: RemoteFile, disk_bytes: int = 1000) -> Source:
        source = Source(
            "toy", "1", files, disk_bytes, 10, "free", "nobody", ("toy",), tuple(file.name for file in files)
        )
        monkeypatch.setitem(SOURCES, "toy", source)
        return source

    return put
