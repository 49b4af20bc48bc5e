"""TIES on CPUs: compiled kernels for exact thresholds, for the sign vote and for the merge, each reading its data once.

Every entry goes through the same correctly rounded operations in the same order as in the tensor code of ``ties.py``
and ``magnitudes.py``, so results are the same to the last bit. A kernel works on blocks that stay in the first-level
cache, with inner loops that the compiler turns into vector instructions.

Letters: N models, n entries of one piece.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from neurocl.compat.numba_cache import ensure_numba_cache

ensure_numba_cache()

Array = NDArray[Any]

BLOCK = 1024
# Few enough that a block without a single value of the bin is the rule, many enough for full vectors.
STRIPE = 64
BIN_SHIFT = 15


@njit(cache=True, nogil=True)
def _count_bins(base: Array, model: Array, counts: Array, more_counts: Array) -> int:
    rounded = np.empty(BLOCK, np.float32)
    bits = rounded.view(np.int32)
    num_zeros = 0
    for start in range(0, base.size, BLOCK):
        size = min(BLOCK, base.size - start)
        b, x = base[start : start + size], model[start : start + size]
        zeros = 0
        for i in range(size):
            difference = x[i] - b[i]
            zeros += difference == 0
            rounded[i] = np.float32(abs(difference))
        num_zeros += zeros
        # Neighbours often share a bin; two tables keep one increment from waiting for the other.
        for i in range(0, size - 1, 2):
            counts[bits[i] >> BIN_SHIFT] += 1
            more_counts[bits[i + 1] >> BIN_SHIFT] += 1
        if size % 2:
            counts[bits[size - 1] >> BIN_SHIFT] += 1
    return num_zeros


def count_bins(base: Tensor, model: Tensor, counts: Tensor) -> int:
    """Add the bins of |model - base| [n] to ``counts`` [65536] (int64); returns the number of exact zeros."""
    piece = np.zeros((2, counts.numel()), np.int32)
    num_zeros = _count_bins(base.numpy(), model.numpy(), piece[0], piece[1])
    total = counts.numpy()
    total += piece[0]
    total += piece[1]
    return int(num_zeros)


@njit(cache=True, nogil=True)
def _collect_bin(base: Array, model: Array, number: int, out: Array) -> int:
    rounded = np.empty(STRIPE, np.float32)
    bits = rounded.view(np.int32)
    low, high = np.int32(number << BIN_SHIFT), np.int32(number << BIN_SHIFT | ((1 << BIN_SHIFT) - 1))
    found = 0
    for start in range(0, base.size, STRIPE):
        size = min(STRIPE, base.size - start)
        b, x = base[start : start + size], model[start : start + size]
        inside = np.int32(0)
        for i in range(size):
            rounded[i] = np.float32(abs(x[i] - b[i]))
        for i in range(size):
            inside += np.int32((bits[i] >= low) & (bits[i] <= high))
        if inside == 0:
            continue
        for i in range(size):
            magnitude = abs(x[i] - b[i])
            if bits[i] >= low and bits[i] <= high and magnitude > 0:
                out[found] = magnitude
                found += 1
    return found


def collect_bin(base: Tensor, model: Tensor, number: int) -> Tensor:
    """The non-zero values of |model - base| [n] whose float32 rounding is in bin ``number``, in order."""
    out = base.new_empty(base.numel())
    found = _collect_bin(base.numpy(), model.numpy(), number, out.numpy())
    return out[:found].clone()


@njit(cache=True, nogil=True)
def _elect(
    base: Array, models: Array, weights: Array, thresholds: Array, frequency: bool, start: int, size: int, total: Array
) -> None:
    """Sum of the trimmed, weighted task vectors (or of their signs) over one block, models in their order."""
    zero = base.dtype.type(0)
    b = base[start : start + size]
    for i in range(size):
        total[i] = zero
    for m in range(len(models)):
        threshold, weight, x = thresholds[m], weights[m], models[m, start : start + size]
        for i in range(size):
            difference = x[i] - b[i]
            kept = difference * weight if abs(difference) >= threshold else zero
            if frequency:
                total[i] += base.dtype.type(kept > 0) - base.dtype.type(kept < 0)
            else:
                total[i] += kept


@njit(cache=True, nogil=True)
def _vote(base: Array, models: Array, weights: Array, thresholds: Array, frequency: bool) -> int:
    total = np.empty(BLOCK, base.dtype)
    balance = 0
    for start in range(0, base.size, BLOCK):
        size = min(BLOCK, base.size - start)
        _elect(base, models, weights, thresholds, frequency, start, size, total)
        block = 0
        for i in range(size):
            block += int(total[i] > 0) - int(total[i] < 0)
        balance += block
    return balance


def vote(base: Tensor, models: Tensor, weights: Tensor, thresholds: Tensor, frequency: bool) -> int:
    """Entries of the piece whose elected sign is plus, less those where it is minus."""
    return int(_vote(base.numpy(), models.numpy(), weights.numpy(), thresholds.numpy(), frequency))


MEAN, SUM, MAX = 0, 1, 2
COMBINE = {"mean": MEAN, "sum": SUM, "max": MAX}


@njit(cache=True, nogil=True)
def _combine(
    base: Array,
    models: Array,
    weights: Array,
    thresholds: Array,
    majority: float,
    frequency: bool,
    combine: int,
    out: Array,
) -> None:
    zero, one = base.dtype.type(0), base.dtype.type(1)
    sign = np.empty(BLOCK, base.dtype)
    share = np.empty(BLOCK, base.dtype)
    fallback = base.dtype.type(majority)
    for start in range(0, base.size, BLOCK):
        size = min(BLOCK, base.size - start)
        b, value = base[start : start + size], out[start : start + size]
        _elect(base, models, weights, thresholds, frequency, start, size, sign)
        for i in range(size):
            sign[i] = one if sign[i] > 0 else (-one if sign[i] < 0 else fallback)
            value[i] = zero
            share[i] = zero
        for m in range(len(models)):
            threshold, weight, x = thresholds[m], weights[m], models[m, start : start + size]
            part = abs(weight)
            for i in range(size):
                difference = x[i] - b[i]
                kept = difference * weight if abs(difference) >= threshold else zero
                agreeing = kept if kept * sign[i] > 0 else zero
                if combine == MAX:
                    value[i] = agreeing if abs(agreeing) > abs(value[i]) else value[i]
                else:
                    value[i] += agreeing
                    share[i] += part if agreeing != 0 else zero
        for i in range(size):
            if combine == MEAN:
                value[i] /= share[i] if share[i] != 0 else one
            value[i] = b[i] + value[i]


def combine(
    base: Tensor,
    models: Tensor,
    weights: Tensor,
    thresholds: Tensor,
    majority: float,
    frequency: bool,
    how: str,
) -> Tensor:
    """The merged piece, [n]."""
    out = base.new_empty(base.numel())
    _combine(
        base.numpy(),
        models.numpy(),
        weights.numpy(),
        thresholds.numpy(),
        majority,
        frequency,
        COMBINE[how],
        out.numpy(),
    )
    return out
