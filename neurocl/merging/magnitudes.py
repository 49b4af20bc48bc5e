"""Exact order statistics of task-vector magnitudes, taken over pieces, without sorting and in little memory.

The magnitudes are counted in 65,536 bins, which are the upper 16 bits of the magnitude rounded to float32: rounding
and cutting keep the order, so every value of a lower bin is at most every value of a higher one. A second pass
collects the one bin that holds the wanted rank, unrounded, and the value is selected inside it. The result is that of
a selection over all values at once, to the last bit, however the data was cut.

Letters: N models, n entries of one piece, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 1 << 16
BIN_SHIFT = 15  # magnitudes have 31 bits in float32
# Below this many entries a kernel gains less than loading it costs.
COMPILED_ENTRIES = 1 << 15
COMPACT_AT = 1 << 20


class Magnitudes:
    """The values at given ranks of |model - base|, for each of several models.

    Args:
        num_models: N.
        ranks: maps the number of entries to R ranks, 1 being the smallest magnitude. A rank below 1 stands for 0,
            one above the number of entries for infinity.

    Attributes:
        values: after the last pass, the magnitudes at those ranks, [N, R] float64.
    """

    values: Tensor

    def __init__(self, num_models: int, ranks: Callable[[int], Sequence[int]]) -> None:
        self._ranks = ranks
        self._counting = True
        self._num_entries = 0
        self._num_zeros = [0] * num_models
        self._counts = torch.zeros(num_models, NUM_BINS, dtype=torch.int64)
        self._wanted: list[list[_Rank]] = []

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``base`` [n], ``models`` [N, n]."""
        if self._counting:
            self._num_entries += base.numel()
            for index, model in enumerate(models):
                self._num_zeros[index] += count_bins(base, model, self._counts[index])
            return
        for model, ranks in zip(models, self._wanted, strict=True):
            bins = {rank.bin for rank in ranks if rank.value is None}
            for number in bins:
                found = collect_bin(base, model, number)
                for rank in ranks:
                    if rank.bin == number and rank.value is None:
                        rank.collected.add(found)

    def another_pass(self) -> bool:
        """True after the counting pass, unless no bin has to be looked into."""
        if self._counting:
            self._counting = False
            positions = self._ranks(self._num_entries)
            for counts, zeros in zip(self._counts.numpy(), self._num_zeros, strict=True):
                below = np.cumsum(counts)
                self._wanted.append([_locate(rank, self._num_entries, zeros, below) for rank in positions])
            del self._counts
            if any(rank.value is None for ranks in self._wanted for rank in ranks):
                return True
        found = [[rank.found() for rank in ranks] for ranks in self._wanted]
        self.values = torch.tensor(found, dtype=torch.float64)
        return False


class _Rank:
    """One wanted rank: its value when that is known, otherwise the bin to collect and the rank inside it."""

    def __init__(self, value: float | None, number: int = 0, inside: int = 0) -> None:
        self.value = value
        self.bin = number
        self.inside = inside
        self.collected = _Multiset()

    def found(self) -> float:
        return self.collected.smallest(self.inside) if self.value is None else self.value


def _locate(rank: int, num_entries: int, num_zeros: int, below: np.ndarray) -> _Rank:
    """``below``: entries in each bin and all lower ones. Zeros, which may be most of a model, need no second look."""
    if rank > num_entries:
        return _Rank(math.inf)
    if rank <= num_zeros:
        return _Rank(0.0)
    number = int(np.searchsorted(below, rank))
    before = int(below[number - 1]) if number else num_zeros
    return _Rank(None, number, rank - before)


class _Multiset:
    """Values with their multiplicity; the task vectors of bfloat16 models repeat few values many times."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._counts: Tensor | None = None
        self._pending: list[Tensor] = []
        self._num_pending = 0

    def add(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        self._pending.append(values.double())
        self._num_pending += values.numel()
        settled = 0 if self._values is None else self._values.numel()
        if self._num_pending >= max(COMPACT_AT, settled):
            self._compact()

    def _compact(self) -> None:
        values, counts = torch.cat(self._pending), None
        self._pending, self._num_pending = [], 0
        unique, repeats = torch.unique(values, return_counts=True)
        if self._values is not None and self._counts is not None:
            both, place = torch.unique(torch.cat([self._values, unique]), return_inverse=True)
            counts = torch.zeros(both.numel(), dtype=torch.int64, device=both.device)
            counts.index_add_(0, place, torch.cat([self._counts, repeats]))
            unique, repeats = both, counts
        self._values, self._counts = unique, repeats

    def smallest(self, rank: int) -> float:
        """The value of the given rank, counted from 1."""
        if self._values is None and self._num_pending < COMPACT_AT:
            return float(torch.cat(self._pending).kthvalue(rank).values)
        if self._pending:
            self._compact()
        assert self._values is not None
        assert self._counts is not None
        return float(self._values[torch.searchsorted(self._counts.cumsum(0), rank)])


def count_bins(base: Tensor, model: Tensor, counts: Tensor) -> int:
    """Add the bins of |model - base| [n] to ``counts`` [65536] (int64); returns the number of exact zeros."""
    kernels = compiled(base, model)
    if kernels is not None:
        return int(kernels.count_bins(base.contiguous(), model.contiguous(), counts))
    magnitudes = (model - base).abs_()
    counts += torch.bincount(_bins(magnitudes), minlength=NUM_BINS).to(counts.device)
    return magnitudes.numel() - int(torch.count_nonzero(magnitudes))


def collect_bin(base: Tensor, model: Tensor, number: int) -> Tensor:
    """The non-zero values of |model - base| [n] in bin ``number``, in order."""
    kernels = compiled(base, model)
    if kernels is not None:
        found: Tensor = kernels.collect_bin(base.contiguous(), model.contiguous(), number)
        return found
    magnitudes = (model - base).abs_()
    return magnitudes[(_bins(magnitudes) == number) & (magnitudes > 0)]


def _bins(magnitudes: Tensor) -> Tensor:
    return magnitudes.float().view(torch.int32) >> BIN_SHIFT


def compiled(base: Tensor, models: Tensor) -> ModuleType | None:
    """The compiled kernels if they take these tensors and there is enough to do for them to pay."""
    if base.device.type != "cpu" or base.dtype not in (torch.float32, torch.float64):
        return None
    if base.numel() < COMPILED_ENTRIES or base.requires_grad or models.requires_grad:
        return None
    from neurocl.merging import ties_numba

    return ties_numba
