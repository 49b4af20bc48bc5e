"""A place for compiled kernels where numba would find none, which it treats as an error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs


def ensure_numba_cache(folders: Sequence[Path] | None = None) -> Path | None:
    """Give numba a private temporary cache if neither the package's folder nor the user's cache can be written.

    Call before the first kernel is defined. numba's cache files are pickles, so a folder that others can write is
    not an option.

    Args:
        folders: where numba would look; default the folder of the kernels and the user's cache.

    Returns: the temporary folder, or None if there was no need for one.
    """
    if os.environ.get("NUMBA_CACHE_DIR"):
        return None
    if folders is None:
        folders = [Path(__file__).parents[1] / "spiking", Path(platformdirs.user_cache_dir("numba"))]
    if any(_writable(folder) for folder in folders):
        return None
    temporary = Path(tempfile.mkdtemp(prefix="neurocl-kernels-"))
    os.environ["NUMBA_CACHE_DIR"] = str(temporary)
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(temporary)
    return temporary


def _writable(folder: Path) -> bool:
    """Whether ``folder``, or the first parent that exists, can be written."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)
