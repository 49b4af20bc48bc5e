"""Unpacking archives without letting a member out of the folder."""

from __future__ import annotations

import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from neurocl.errors import RunError


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar (any compression) or zip archive into ``folder``, which exists.

    All member names are looked at before the first one is written.

    Raises:
        RunError: a damaged archive, or a member with an absolute path, ``..``, or a link or device.
    """
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RunError(f"{archive}: damaged archive ({error})") from error


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            _check_name(archive, member.name)
            if not (member.isfile() or member.isdir()):
                raise RunError(f"{archive}: member {member.name!r} is a link or device; nothing was unpacked")
        opened.extractall(folder, filter="data")


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            _check_name(archive, member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise RunError(f"{archive}: member {member.filename!r} is a link or device; nothing was unpacked")
        opened.extractall(folder)


def _check_name(archive: Path, name: str) -> None:
    windows = PureWindowsPath(name)
    absolute = PurePosixPath(name).is_absolute() or windows.drive or windows.root
    if absolute or ".." in windows.parts:
        raise RunError(f"{archive}: member {name!r} would land outside the folder; nothing was unpacked")
