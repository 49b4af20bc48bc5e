"""Fetching, importing and verifying published sets.

Each set has the folder ``ROOT/NAME/VERSION``. In it ``archives`` holds what was fetched until it is unpacked,
``data`` the files that readers open, ``MANIFEST.sha256`` the digest of each of them (``sha256sum -c`` reads
it), ``COMPLETE.json`` where they came from. ``data`` appears under its name only when everything is in it.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from neurocl.data.digest import content_digest, file_digest, is_gzip
from neurocl.data.extract import unpack
from neurocl.data.locate import cache_dir, download_root, search_roots
from neurocl.data.sources import RemoteFile, Source, find_source, locate_source
from neurocl.data.transfer import Progress, describe, fetch
from neurocl.errors import RunError, UserError

_SPARE = 1.1


@dataclass(frozen=True)
class PlannedFile:
    """One file that a download would fetch."""

    url: str
    num_bytes: int | None
    digest: str
    target: Path


def plan(name: str, *, data_dir: str | Path | None = None, mirror: int = 0) -> list[PlannedFile]:
    """What ``download`` would fetch and where it would put it; contacts nobody, writes nothing."""
    source = _downloadable(name)
    _check_mirror(source, mirror)
    base = _home(source, data_dir)
    return [
        PlannedFile(file.urls[mirror], file.num_bytes, file.digest, base / "archives" / file.name)
        for file in source.files
    ]


def download(
    name: str,
    *,
    data_dir: str | Path | None = None,
    mirror: int = 0,
    keep_archives: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Fetch, verify and unpack a set; does nothing when it is complete, resumes what was cut.

    Two processes may ask for the same set: the second waits, then finds it complete.

    Args:
        data_dir: the root to put it under, else ``$NEUROCL_DATA``, else the user's cache.
        mirror: which address to try first, 0 is the main one.
        keep_archives: keep the fetched archives beside the unpacked files.
        progress: called with the bytes that are there and the total.
    Returns: the folder with the data.
    Raises:
        UserError: unknown set, one that cannot be downloaded, or a folder that cannot be written.
        RunError: no room, no address that gives the file, a wrong digest, an unsafe archive.
    """
    source = _downloadable(name)
    _check_mirror(source, mirror)
    base = _home(source, data_dir)
    with _locked(base):
        if _complete(base):
            return base / "data"
        archives = base / "archives"
        archives.mkdir(exist_ok=True)
        _check_space(source, base)
        done = 0
        total = _total_bytes(source)
        for file in source.files:
            path = fetch(
                file,
                archives,
                source=source.name,
                mirror=mirror,
                progress=_shifted(progress, done, total),
            )
            done += path.stat().st_size
        return _finish(source, base, keep_archives=keep_archives)


def import_files(name: str, path: str | Path, *, data_dir: str | Path | None = None) -> Path:
    """Adopt files that the user already has: check their digests, copy them in, unpack them.

    Args:
        path: one published file under any name, or a folder that holds them under their names.
    Returns: the folder with the data.
    Raises:
        UserError: a missing file, one with another digest, or files that are still missing afterwards
            (what was given is kept, so files can be imported one after the other).
        RunError: no room, or an unsafe archive.
    """
    source = find_source(name)
    given = Path(path).expanduser()
    if not given.exists():
        raise UserError(f"{given}: no such file or folder")
    chosen = _in_folder(source, given) if given.is_dir() else [_matching(source, given)]
    base = _home(source, data_dir)
    with _locked(base):
        if _complete(base):
            return base / "data"
        archives = base / "archives"
        archives.mkdir(exist_ok=True)
        _check_space(source, base)
        for file, found in chosen:
            # copied, not linked: a later change of the original must not reach the verified set
            copy = archives / f"{file.name}.copy"
            shutil.copyfile(found, copy)
            copy.replace(archives / _kept_name(file, found))
        missing = [file for file in source.files if _archived(archives, file) is None]
        if missing:
            wanted = "; ".join(f"{file.name} ({describe(file)})" for file in missing)
            raise UserError(f"{source.name} is not complete yet, import also: {wanted}")
        return _finish(source, base, keep_archives=False)


def verify(name: str, *, data_dir: str | Path | None = None) -> int:
    """Hash every file of a downloaded or imported set again.

    Returns: the number of files, all good.
    Raises:
        UserError: the set was not downloaded or imported here.
        RunError: a file is missing or has another digest; the message names it.
    """
    source = find_source(name)
    base = _installed(source, data_dir)
    if base is None:
        raise UserError(f"{source.name} was not downloaded here; type: neurocl data download {source.name}")
    manifest = base / "MANIFEST.sha256"
    try:
        expected = json.loads((base / "COMPLETE.json").read_text())["manifest_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{base / 'COMPLETE.json'}: damaged; {_again(source, base)}") from error
    if not manifest.is_file() or file_digest(manifest) != expected:
        raise RunError(f"{manifest}: changed since the download; {_again(source, base)}")
    lines = manifest.read_text().splitlines()
    for line in lines:
        expected, _, relative = line.partition("  ")
        path = base / relative
        if not path.is_file():
            raise RunError(f"{path}: missing; {_again(source, base)}")
        if file_digest(path) != expected:
            raise RunError(f"{path}: its sha256 is no longer {expected}; {_again(source, base)}")
    return len(lines)


def state(
    name: str, *, data_dir: str | Path | None = None
) -> tuple[Literal["absent", "partial", "complete"], Path | None]:
    """Whether a set is on this machine, and the folder that holds its files (or parts)."""
    source = find_source(name)
    root = Path(data_dir) if data_dir else None
    sign = locate_source(source.name, root)
    if sign is not None:
        return "complete", sign.parent
    for candidate in search_roots(root):
        archives = candidate / source.name / source.version / "archives"
        if archives.is_dir() and any(archives.iterdir()):
            return "partial", archives
    return "absent", None


def matches(file: RemoteFile, path: Path) -> bool:
    """Whether ``path`` is the registered file, or the same content compressed by another program."""
    algorithm, _, expected = file.digest.partition(":")
    if file_digest(path, algorithm) == expected:
        return True
    return file.content_md5 is not None and content_digest(path) == file.content_md5


def _downloadable(name: str) -> Source:
    source = find_source(name)
    if not source.downloadable:
        wanted = "; ".join(f"{file.name} ({describe(file)})" for file in source.files)
        raise UserError(
            f"{source.name} has no public address in this form; with {wanted} type: "
            f"neurocl data import {source.name} PATH"
        )
    return source


def _check_mirror(source: Source, mirror: int) -> None:
    highest = len(source.files[0].urls) - 1
    if not 0 <= mirror <= highest:
        raise UserError(f"mirror must be 0 to {highest} for {source.name}, got {mirror}")


def _home(source: Source, data_dir: str | Path | None) -> Path:
    return download_root(Path(data_dir) if data_dir else None) / source.name / source.version


def _installed(source: Source, data_dir: str | Path | None) -> Path | None:
    for root in search_roots(Path(data_dir) if data_dir else None):
        base = root / source.name / source.version
        if _complete(base):
            return base
    return None


def _complete(base: Path) -> bool:
    return (base / "COMPLETE.json").is_file() and (base / "data").is_dir()


def _again(source: Source, base: Path) -> str:
    return f"remove {base} and type: neurocl data download {source.name}"


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = FileLock(base / ".lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{base} cannot be written ({error.strerror or error}); choose another place with --data-dir, "
            f"such as {cache_dir() / 'data'}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _check_space(source: Source, base: Path) -> None:
    here = sum(path.stat().st_size for path in (base / "archives").iterdir() if path.is_file())
    needed = int(source.disk_bytes * _SPARE) - here
    free = shutil.disk_usage(base).free
    if free < needed:
        raise RunError(f"{base} has {free:,} bytes free, {source.name} needs {needed:,}: {needed - free:,} are missing")


def _total_bytes(source: Source) -> int | None:
    sizes = [file.num_bytes for file in source.files if file.num_bytes is not None]
    return sum(sizes) if len(sizes) == len(source.files) else None


def _shifted(progress: Progress | None, before: int, total: int | None) -> Progress | None:
    """Progress of the whole set from the progress of one file."""
    if progress is None:
        return None
    return lambda done, file_total: progress(before + done, total)


def _finish(source: Source, base: Path, *, keep_archives: bool) -> Path:
    archives, data = base / "archives", base / "data"
    for left in base.glob("data.tmp-*"):
        shutil.rmtree(left)
    growing = Path(tempfile.mkdtemp(prefix="data.tmp-", dir=base))
    try:
        received = [_place(file, archives, growing) for file in source.files]
    except BaseException:
        shutil.rmtree(growing)
        raise
    # mkdtemp makes folders that only their owner can read
    growing.chmod(0o755)
    if data.exists():
        shutil.rmtree(data)
    growing.rename(data)
    _write_text(base / "MANIFEST.sha256", "".join(_manifest_lines(base, data)))
    record = {
        "name": source.name,
        "version": source.version,
        "files": received,
        "manifest_sha256": file_digest(base / "MANIFEST.sha256"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "neurocl": version("neurocl"),
    }
    _write_text(base / "COMPLETE.json", json.dumps(record, indent=2) + "\n")
    if not keep_archives:
        shutil.rmtree(archives)
    return data


def _place(file: RemoteFile, archives: Path, folder: Path) -> dict[str, object]:
    """Put what ``file`` holds into ``folder``; returns its line of the record."""
    path = _archived(archives, file)
    if path is None:
        raise RunError(f"{archives / file.name}: vanished while the set was put together")
    if file.unpack != "none":
        unpack(path, folder)
    else:
        try:
            os.link(path, folder / path.name)
        except OSError:
            # file systems without hard links
            shutil.copyfile(path, folder / path.name)
    return {"name": path.name, "urls": file.urls, "bytes": path.stat().st_size, "digest": file.digest}


def _manifest_lines(base: Path, data: Path) -> Iterator[str]:
    for path in sorted(data.rglob("*")):
        if path.is_file():
            yield f"{file_digest(path)}  {path.relative_to(base).as_posix()}\n"


def _write_text(path: Path, text: str) -> None:
    growing = path.with_name(path.name + ".tmp")
    growing.write_text(text)
    os.replace(growing, path)


def _plain_name(file: RemoteFile) -> str:
    return file.name.removesuffix(".gz")


def _kept_name(file: RemoteFile, found: Path) -> str:
    """Readers tell gzip by the name, so an uncompressed copy loses the ending."""
    return file.name if is_gzip(found) or file.unpack != "none" else _plain_name(file)


def _archived(archives: Path, file: RemoteFile) -> Path | None:
    for path in (archives / file.name, archives / _plain_name(file)):
        if path.is_file():
            return path
    return None


def _in_folder(source: Source, folder: Path) -> list[tuple[RemoteFile, Path]]:
    chosen = []
    for file in source.files:
        found = next((folder / n for n in (file.name, _plain_name(file)) if (folder / n).is_file()), None)
        if found is None:
            raise UserError(f"{folder}: {file.name} ({describe(file)}) is not there")
        if not matches(file, found):
            algorithm = file.digest.partition(":")[0]
            raise UserError(
                f"{found}: not the published file ({algorithm} {file_digest(found, algorithm)}, expected "
                f"{describe(file)})"
            )
        chosen.append((file, found))
    return chosen


def _matching(source: Source, path: Path) -> tuple[RemoteFile, Path]:
    for file in source.files:
        if matches(file, path):
            return file, path
    wanted = "; ".join(f"{file.name} ({describe(file)})" for file in source.files)
    raise UserError(f"{path}: none of the published files of {source.name} (sha256 {file_digest(path)}): {wanted}")
