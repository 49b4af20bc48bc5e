"""One file over http: resume, retry, mirrors; only what has the registered digest is handed on.

pooch checks and keeps files but cannot resume: it deletes its temporary file when a connection breaks. So
this downloader (a pooch downloader is any callable of url, output file and pooch) keeps the bytes in its
own ``FILE.part``, with the server's validator in ``FILE.part.etag``, and moves them over when complete.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from neurocl.data.digest import file_digest
from neurocl.data.sources import RemoteFile
from neurocl.errors import RunError

if TYPE_CHECKING:
    import requests

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the size of the file (None if nobody knows it)."""

# seconds before each retry of one address
RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
_TIMEOUT = (10.0, 60.0)
_PIECE = 1 << 18
_RANGE_TOTAL = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class _Refused(Exception):
    """The address will not give the file (403, 404 ...); another one may."""


class _Interrupted(Exception):
    """The line broke or the server is busy; the same address may do better later."""


def fetch(
    file: RemoteFile,
    folder: Path,
    *,
    source: str,
    mirror: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make ``folder/file.name`` hold the registered file, from the cache or the network.

    Args:
        source: name of the data set, for the advice in messages.
        mirror: which address to try first, 0 is the main one; the others follow.
    Returns: the path of the verified file.
    Raises:
        RunError: no address gave the file (what came is kept in ``.part``), or its size or digest is
            wrong (kept as ``.bad``); an older good file is never touched.
    """
    import pooch

    # its notes on stderr would tear the progress bar
    pooch.get_logger().setLevel("WARNING")
    target = folder / file.name
    urls = file.urls[mirror:] + file.urls[:mirror]
    refusals = []
    for url in urls:
        downloader = _Downloader(file, target, progress)
        try:
            pooch.retrieve(url, file.digest, fname=file.name, path=folder, downloader=downloader)
        except (_Refused, _Interrupted) as error:
            refusals.append(f"{urlsplit(url).netloc}: {error}")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RunError(f"{folder}: the disk is full; {target.name}.part is kept") from error
            raise
        else:
            return target
    raise RunError(
        f"{file.name} could not be fetched ({'; '.join(refusals)}); with the file from elsewhere "
        f"({describe(file)}) type: neurocl data import {source} PATH"
    )


def describe(file: RemoteFile) -> str:
    """Size and digest of a file as messages show them."""
    size = f"{file.num_bytes:,} bytes, " if file.num_bytes is not None else ""
    return f"{size}{file.digest}"


@dataclass
class _Downloader:
    file: RemoteFile
    target: Path
    progress: Progress | None
    part: Path = field(init=False)
    tag: Path = field(init=False)

    def __post_init__(self) -> None:
        self.part = self.target.with_name(self.target.name + ".part")
        self.tag = self.target.with_name(self.target.name + ".part.etag")

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        for wait in (*RETRY_WAITS, None):
            try:
                self._receive(url)
                break
            except _Interrupted:
                if wait is None:
                    raise
                time.sleep(wait)
        self._verify(url)
        self.tag.unlink(missing_ok=True)
        self.part.replace(output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)

    def _receive(self, url: str) -> None:
        import requests
        import urllib3

        have = self._have()
        if have and have == self.file.num_bytes:
            return
        validator = self.tag.read_text() if self.tag.exists() else ""
        if have and not validator:
            # nothing says that the rest would belong to the same file
            self._discard()
            have = 0
        # without identity a proxy may compress the stream, and offsets stop meaning bytes of the file
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
                if self._accept(response, have):
                    self._write(response, have, url)
        except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
            raise _Interrupted(f"connection failed ({_reason(error)})") from error

    def _accept(self, response: requests.Response, have: int) -> bool:
        """Whether a body follows that is worth writing; False when everything is there already."""
        status = response.status_code
        if status in (200, 206):
            return True
        if status == 416:
            _, total = _content_range(response)
            if total == have:
                return False
            self._discard()
            raise _Interrupted("the part on disk is longer than the file, starting over")
        if status >= 500 or status == 429:
            raise _Interrupted(f"answered {status}")
        raise _Refused(f"answered {status}")

    def _write(self, response: requests.Response, have: int, url: str) -> None:
        resumed = response.status_code == 206
        total = self.file.num_bytes
        if resumed:
            start, announced = _content_range(response)
            if start != have:
                self._discard()
                raise _Interrupted("the server sent another part than the one asked for")
        else:
            have = 0
            length = response.headers.get("Content-Length", "")
            announced = int(length) if length.isdigit() else None
        if total is not None and announced not in (None, total):
            raise _Refused(f"offers {announced:,} bytes, {total:,} are registered")
        total = total if total is not None else announced
        if not resumed:
            # empty the old part before its new validator is stored, or a crash between them mixes two files
            self.part.write_bytes(b"")
        self._store_validator(response)
        with self.part.open("ab") as out:
            for piece in response.raw.stream(_PIECE, decode_content=False):
                out.write(piece)
                have += len(piece)
                if self.progress is not None:
                    self.progress(have, total)
                if self.file.num_bytes is not None and have > self.file.num_bytes:
                    break
        if self.file.num_bytes is not None and have > self.file.num_bytes:
            self._reject(url, f"more than the registered {self.file.num_bytes:,} bytes came")
        if total is not None and have < total:
            raise _Interrupted(f"the connection ended after {have:,} of {total:,} bytes")

    def _store_validator(self, response: requests.Response) -> None:
        entity = response.headers.get("ETag", "")
        # a weak tag may not be used in If-Range
        if not entity or entity.startswith("W/"):
            entity = response.headers.get("Last-Modified", "")
        if entity:
            self.tag.write_text(entity)
        else:
            self.tag.unlink(missing_ok=True)

    def _verify(self, url: str) -> None:
        algorithm, _, expected = self.file.digest.partition(":")
        actual = file_digest(self.part, algorithm)
        if actual != expected:
            self._reject(url, f"{algorithm} of its {self._have():,} bytes is {actual}, expected {expected}")

    def _reject(self, url: str, why: str) -> None:
        bad = self.target.with_name(self.target.name + ".bad")
        self.part.replace(bad)
        self.tag.unlink(missing_ok=True)
        advice = f"; try another address with --mirror (0 to {len(self.file.urls) - 1})"
        raise RunError(
            f"{self.target.name} from {url} is not the registered file: {why}; kept as {bad}"
            + (advice if len(self.file.urls) > 1 else "")
        )


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size from a Content-Range header, None for what it does not say."""
    match = _RANGE_TOTAL.match(response.headers.get("Content-Range", ""))
    if match is None:
        return None, None
    start, total = match.groups()
    return (int(start) if start else None), (int(total) if total != "*" else None)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return str(error) or type(error).__name__
