"""Fixtures that every test may use: numeric reference cases, one torch thread, a clean environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"


def reference_cases(name: str) -> list[dict[str, Any]]:
    """The cases of ``tests/fixtures/<name>.npz``, keys without their ``c<i>_`` prefix."""
    with np.load(FIXTURES / f"{name}.npz") as archive:
        prefixes = [f"c{index}_" for index in range(int(archive["n_cases"]))]
        return [
            {key.removeprefix(prefix): archive[key] for key in archive if key.startswith(prefix)} for prefix in prefixes
        ]


def reference(name: str) -> dict[str, Any]:
    """All arrays of a reference file without cases."""
    with np.load(FIXTURES / f"{name}.npz") as archive:
        return dict(archive)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
