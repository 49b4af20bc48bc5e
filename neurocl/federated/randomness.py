"""Where every random number of a federation comes from: independent streams named by a label and numbers.

A stream depends on the run's seed, on what it is for and on which task, round or client it serves, never on what was
drawn elsewhere. So the same numbers come out in every process, in any order of the clients and after a resume.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    import torch


def stream(seed: int, label: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator for one purpose, at the beginning of its stream.

    Give a label the same count of numbers everywhere: NumPy fills short seeds with zeros, which makes
    ``stream(7, "split")`` and ``stream(7, "split", 0)`` one stream.

    Args:
        seed: the run's seed.
        label: the purpose, such as ``"split"`` or ``"shuffle"``.
        numbers: which one: task, round, client ...

    Raises:
        ValueError: the seed or a number is not in 0 <= number < 2^32 (more would run into its neighbour's place).
    """
    words = [index(seed), crc32(label.encode("utf-8")), *map(index, numbers)]
    if any(not 0 <= word < 2**32 for word in words):
        raise ValueError(f"seed and numbers must lie in 0 <= number < 2^32, got {seed} and {numbers} for {label!r}")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def torch_stream(seed: int, label: str, *numbers: int) -> torch.Generator:
    """A PyTorch generator (CPU) seeded by the first draw of :func:`stream` with the same arguments.

    Raises:
        ValueError: as :func:`stream`.
    """
    # Partitions need no torch, and their configuration is read by the command line's help.
    import torch

    return torch.Generator().manual_seed(int(stream(seed, label, *numbers).integers(2**63)))
