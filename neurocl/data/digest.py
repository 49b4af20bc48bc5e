"""Digests of files, read in pieces."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

from neurocl.errors import UserError

_PIECE = 1 << 20


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file; raises UserError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, algorithm).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip files do, whatever its name."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def content_digest(path: Path, algorithm: str = "md5") -> str | None:
    """The digest of what a gzip file (or a plain file) holds, or None for a broken gzip stream.

    Two copies of the same data compressed by different programs agree here and nowhere else.
    """
    if not is_gzip(path):
        return file_digest(path, algorithm)
    running = hashlib.new(algorithm)
    try:
        with gzip.open(path, "rb") as stream:
            while piece := stream.read(_PIECE):
                running.update(piece)
    except (OSError, EOFError, zlib.error):
        return None
    return running.hexdigest()
