"""Where the tests find recorded tracks, which may not be part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_file(name: str) -> Path:
    """``$NEUROCL_DATA/trajectory/NAME``; the test is skipped if it is not there."""
    root = os.environ.get("NEUROCL_DATA")
    if not root:
        pytest.skip("NEUROCL_DATA is not set; this test needs recorded tracks")
    path = Path(root) / "trajectory" / name
    if not path.exists():
        pytest.skip(f"no trajectory/{name} in NEUROCL_DATA")
    return path
