"""Where data sets are looked for on this machine, and where they are put."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from neurocl.errors import UserError


def cache_dir() -> Path:
    """The folder for what can be made again: ``$NEUROCL_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("NEUROCL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("neurocl"))


def download_root(data_dir: Path | None = None) -> Path:
    """Where downloads go: ``data_dir``, else ``$NEUROCL_DATA``, else the cache folder."""
    return search_roots(data_dir)[0]


def search_roots(data_dir: Path | None = None) -> list[Path]:
    """The folders that may hold data sets, the first match wins.

    Raises:
        UserError: ``data_dir`` or ``$NEUROCL_DATA`` names a file.
    """
    named = [("--data-dir", data_dir), ("$NEUROCL_DATA", os.environ.get("NEUROCL_DATA"))]
    roots = []
    for origin, value in named:
        if not value:
            continue
        root = Path(value).expanduser()
        if root.exists() and not root.is_dir():
            raise UserError(f"{origin} must be a folder, got the file {root}")
        roots.append(root)
    return [*roots, cache_dir() / "data"]


def find_file(
    folders: Sequence[str], names: Sequence[str], data_dir: Path | None = None, extra: Sequence[Path] = ()
) -> Path | None:
    """Find the first of ``names`` below the search roots.

    Both layouts are accepted: ``ROOT/FOLDER/NAME``, and ``ROOT/FOLDER/VERSION/data/NAME`` as a download
    leaves it (the highest version first).

    Args:
        folders: names that the set's folder may have.
        names: files or folders that show the set is there, relative to its folder, best first.
        extra: folders to look in after all others.
    Returns: the file or folder found, or None.
    """
    for folder in [*_candidates(folders, data_dir), *extra]:
        for name in names:
            if (folder / name).exists():
                return folder / name
    return None


def absent(source: str, data_dir: Path | None = None, *, downloadable: bool = True) -> UserError:
    """The error for a set that is nowhere: where it was looked for and the one command to type."""
    roots = ", ".join(str(root) for root in search_roots(data_dir))
    command = f"neurocl data {'download' if downloadable else 'import'} {source}"
    if not downloadable:
        command += " PATH"
    return UserError(f"the data set {source} is not here (looked in {roots}); type: {command}")


def _candidates(folders: Sequence[str], data_dir: Path | None) -> list[Path]:
    found = []
    for root in search_roots(data_dir):
        for folder in folders:
            base = root / folder
            found.append(base)
            if base.is_dir():
                found.extend(sorted(base.glob("*/data"), reverse=True))
    return found
