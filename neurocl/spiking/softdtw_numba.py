"""Fused CPU kernel for soft-DTW: distances, recursion and gradient of a tile of samples, one sample per lane.

The series of a tile are transposed into scratch memory, so that every later operation is one vector
instruction for the whole tile, whatever the lengths are. Cells are visited by anti-diagonals, because those
of one diagonal do not wait for each other, and are stored that way: cell (i, j) is row (i + j) * N + i of its
table. The forward sweep keeps the three softmin weights of each cell; the backward sweep is then
multiplications only.

A row of scratch memory is one vector, 16 float32 or 8 float64 numbers; addresses count in rows.

Legend: B batch, L lanes of a tile, N and M time steps of the two series, K features.
"""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numba import njit, types
from torch import Tensor

from neurocl.compat.numba_cache import ensure_numba_cache
from neurocl.spiking.softdtw_lanes import (
    VECTOR_BYTES,
    exp_nonpositive,
    fma,
    load,
    log_one_to_three,
    read_block,
    splat,
    store,
    where_less,
    write_block,
)

ensure_numba_cache()

# Work below which waking a second thread costs more than it saves, where one cell of the recursion counts as much
# as ten features of its distance.
PARALLEL_WORK = 2_500_000

# Scratch memory up to this size (series of about 350 steps) is kept for the next call.
KEPT_BYTES = 64 * 2**20


@njit(cache=True, nogil=True, error_model="numpy")
def _distances(s: Any, cost: int, a: int, b: int, n: int, m: int, k: int, width: int, symmetric: bool) -> None:
    half = splat(s, 0.5)
    zero = splat(s, 0.0)
    for i in range(n):
        row = a + i * width
        j = i if symmetric else 0
        while j + 4 <= m:
            c0, c1, c2, c3 = zero, zero, zero, zero
            p0 = b + j * width
            p1, p2, p3 = p0 + width, p0 + 2 * width, p0 + 3 * width
            for f in range(k):
                value = load(s, row + f)
                d0 = value - load(s, p0 + f)
                d1 = value - load(s, p1 + f)
                d2 = value - load(s, p2 + f)
                d3 = value - load(s, p3 + f)
                c0 = fma(d0, d0, c0)
                c1 = fma(d1, d1, c1)
                c2 = fma(d2, d2, c2)
                c3 = fma(d3, d3, c3)
            cell = cost + (i + j) * n + i
            store(s, cell, half * c0)
            store(s, cell + n, half * c1)
            store(s, cell + 2 * n, half * c2)
            store(s, cell + 3 * n, half * c3)
            j += 4
        while j < m:
            c0 = zero
            p0 = b + j * width
            for f in range(k):
                d0 = load(s, row + f) - load(s, p0 + f)
                c0 = fma(d0, d0, c0)
            store(s, cost + (i + j) * n + i, half * c0)
            j += 1


@njit(cache=True, nogil=True, error_model="numpy")
def _forward(
    s: Any,
    cost: int,
    left: int,
    above: int,
    corner: int,
    v: int,
    n: int,
    m: int,
    symmetric: bool,
    keep: bool,
    gamma: float,
) -> int:
    one = splat(s, 1.0)
    g = splat(s, gamma)
    inverse = splat(s, 1.0 / gamma)
    now, back1, back2 = v, v + n, v + 2 * n
    for d in range(n + m - 1):
        now, back1, back2 = back2, now, back1
        start = max(0, d - m + 1)
        stop = d // 2 + 1 if symmetric else min(n, d)
        if start == 0:
            total = load(s, cost + d * n)
            if d > 0:
                total = total + load(s, back1)
            store(s, now, total)
            if keep:
                store(s, left + d * n, one)
            start = 1
        for i in range(start, stop):
            cell = d * n + i
            from_above = load(s, back1 + i - 1)
            from_corner = load(s, back2 + i - 1)
            # the mirror image of the cell above is left of a cell on the main diagonal
            from_left = from_above if symmetric and 2 * i == d else load(s, back1 + i)
            low = where_less(from_left, from_above, from_left, from_above)
            high = where_less(from_left, from_above, from_above, from_left)
            least = where_less(low, from_corner, low, from_corner)
            middle = where_less(low, from_corner, from_corner, low)
            # the least of the three has weight exp(0) = 1, so two exponentials suffice
            exp_middle = exp_nonpositive((least - middle) * inverse)
            exp_high = exp_nonpositive((least - high) * inverse)
            norm = one + exp_middle + exp_high
            softmin = least - g * log_one_to_three(norm)
            store(s, now + i, load(s, cost + cell) + softmin)
            if keep:
                share = one / norm
                share_high = exp_high * share
                share_middle = exp_middle * share
                share_low = where_less(low, from_corner, share, share_middle)
                store(s, corner + cell, where_less(low, from_corner, share_middle, share))
                store(s, left + cell, where_less(from_left, from_above, share_low, share_high))
                store(s, above + cell, where_less(from_left, from_above, share_high, share_low))
        if d < n and d > 0 and not symmetric:
            store(s, now + d, load(s, back1 + d - 1) + load(s, cost + d * n + d))
            if keep:
                store(s, above + d * n + d, one)
    return now + n - 1


@njit(cache=True, nogil=True, error_model="numpy")
def _backward(
    s: Any, table: int, left: int, above: int, corner: int, n: int, m: int, symmetric: bool, seed: float
) -> None:
    """Overwrite the costs in ``table`` with ``seed`` times the expected alignment."""
    store(s, table + (n + m - 2) * n + n - 1, splat(s, seed))
    for d in range(n + m - 3, -1, -1):
        start = max(0, d - m + 1)
        stop = d // 2 + 1 if symmetric else min(n, d + 1)
        for i in range(start, stop):
            right = (d + 1) * n + i
            below = right + 1
            if i + 1 == n:
                share = load(s, table + right) * load(s, left + right)
            elif d - i + 1 == m:
                share = load(s, table + below) * load(s, above + below)
            else:
                beyond = below + n
                share = load(s, table + beyond) * load(s, corner + beyond)
                from_right = load(s, table + right)
                share = fma(from_right, load(s, left + right), share)
                if symmetric and 2 * i == d:
                    share = fma(from_right, load(s, left + right), share)
                else:
                    share = fma(load(s, table + below), load(s, above + below), share)
            store(s, table + d * n + i, share)


@njit(cache=True, nogil=True, error_model="numpy")
def _gradient(
    s: Any,
    table: int,
    a: int,
    b: int,
    grad: int,
    n: int,
    m: int,
    k: int,
    width: int,
    of_first: bool,
    symmetric: bool,
    accumulate: bool,
) -> None:
    """grad[i] (+)= sum_j E[i, j] (a[i] - b[j]); with ``of_first`` false E is read transposed."""
    zero = splat(s, 0.0)
    rows, columns = (n, m) if of_first else (m, n)
    for i in range(rows):
        for f in range(0, k, 4):
            own, target = a + i * width + f, grad + i * width + f
            x0, x1, x2, x3 = load(s, own), load(s, own + 1), load(s, own + 2), load(s, own + 3)
            g0, g1, g2, g3 = zero, zero, zero, zero
            if accumulate:
                g0, g1, g2, g3 = (
                    load(s, target),
                    load(s, target + 1),
                    load(s, target + 2),
                    load(s, target + 3),
                )
            for j in range(columns):
                first = i if of_first else j
                if symmetric:
                    first = min(i, j)
                e = load(s, table + (i + j) * n + first)
                other = b + j * width + f
                g0 = fma(e, x0 - load(s, other), g0)
                g1 = fma(e, x1 - load(s, other + 1), g1)
                g2 = fma(e, x2 - load(s, other + 2), g2)
                g3 = fma(e, x3 - load(s, other + 3), g3)
            store(s, target, g0)
            store(s, target + 1, g1)
            store(s, target + 2, g2)
            store(s, target + 3, g3)


@njit(cache=True, nogil=True, error_model="numpy")
def _align(
    s: Any,
    work: int,
    a: int,
    b: int,
    grad_a: int,
    grad_b: int,
    n: int,
    m: int,
    k: int,
    width: int,
    symmetric: bool,
    want_a: bool,
    want_b: bool,
    gamma: float,
    seed: float,
) -> int:
    """Soft-DTW of the tile's series at rows ``a`` and ``b``; returns the row that holds the values."""
    size = (n + m - 1) * n
    left, above, corner, v = work + size, work + 2 * size, work + 3 * size, work + 4 * size
    keep = want_a or want_b
    _distances(s, work, a, b, n, m, k, width, symmetric)
    value: int = _forward(s, work, left, above, corner, v, n, m, symmetric, keep, gamma)
    if keep:
        _backward(s, work, left, above, corner, n, m, symmetric, seed)
        if want_a:
            _gradient(s, work, a, b, grad_a, n, m, k, width, True, symmetric, symmetric)
        if want_b:
            _gradient(s, work, b, a, grad_b, n, m, k, width, False, symmetric, symmetric)
    return value


def _tiles(
    x: Any,
    y: Any,
    grad_x: Any,
    grad_y: Any,
    values: Any,
    s: Any,
    first_tile: int,
    stop_tile: int,
    want_x: bool,
    want_y: bool,
    divergence: bool,
    gamma: float,
    scale: float,
) -> None:
    lanes = VECTOR_BYTES // values.itemsize
    batch, n, k = x.shape
    m = y.shape[1]
    width = (k + lanes - 1) // lanes * lanes
    at_x, at_y = 0, n * width
    at_grad_x = at_y + m * width
    at_grad_y = at_grad_x + n * width
    work = at_grad_y + m * width
    for tile in range(first_tile, stop_tile):
        first = tile * lanes
        for i in range(n):
            for f in range(0, k, lanes):
                read_block(x, first, batch - 1, i, f, k - f, s, at_x + i * width + f)
        for j in range(m):
            for f in range(0, k, lanes):
                read_block(y, first, batch - 1, j, f, k - f, s, at_y + j * width + f)
        count = min(lanes, batch - first)
        # the tables are as wide as the first series: put the shorter one there
        if n <= m:
            row = _align(s, work, at_x, at_y, at_grad_x, at_grad_y, n, m, k, width, False, want_x, want_y, gamma, scale)
        else:
            row = _align(s, work, at_y, at_x, at_grad_y, at_grad_x, m, n, k, width, False, want_y, want_x, gamma, scale)
        for lane in range(count):
            values[first + lane] = scale * s[row * lanes + lane]
        if divergence:
            # both arguments of S(x, x) move with x, and it counts one half: the seed is one
            row = _align(s, work, at_x, at_x, at_grad_x, at_grad_x, n, n, k, width, True, want_x, False, gamma, -scale)
            for lane in range(count):
                values[first + lane] -= 0.5 * scale * s[row * lanes + lane]
            row = _align(s, work, at_y, at_y, at_grad_y, at_grad_y, m, m, k, width, True, want_y, False, gamma, -scale)
            for lane in range(count):
                values[first + lane] -= 0.5 * scale * s[row * lanes + lane]
        if want_x:
            for i in range(n):
                for f in range(0, k, lanes):
                    write_block(grad_x, first, batch - 1, i, f, k - f, s, at_grad_x + i * width + f)
        if want_y:
            for j in range(m):
                for f in range(0, k, lanes):
                    write_block(grad_y, first, batch - 1, j, f, k - f, s, at_grad_y + j * width + f)


@functools.cache
def _kernel(dtype: torch.dtype) -> Any:
    """The compiled kernel for one precision: compiled at first use, then kept on disk by numba."""
    real = types.float32 if dtype == torch.float32 else types.float64
    series, vector = types.Array(real, 3, "A"), types.Array(real, 1, "C")
    integer, flag = types.intp, types.boolean
    signature = types.void(
        series,
        series,
        series,
        series,
        vector,
        vector,
        integer,
        integer,
        flag,
        flag,
        flag,
        types.float64,
        types.float64,
    )
    return njit([signature], cache=True, nogil=True, error_model="numpy")(_tiles)


class _Scratch(threading.local):
    """Each thread's scratch memory, kept between calls, since fresh pages cost more than short series do.

    torch aligns its memory to 64 bytes, which the vector loads and stores rely on.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Any] = {}

    def take(self, dtype: torch.dtype, rows: int) -> Any:
        size = rows * VECTOR_BYTES // dtype.itemsize
        if rows * VECTOR_BYTES > KEPT_BYTES:
            return torch.empty(size, dtype=dtype).numpy()
        memory = self.memory.get(dtype)
        if memory is None or memory.size < size:
            memory = self.memory[dtype] = torch.empty(size, dtype=dtype).numpy()
        return memory


_scratch = _Scratch()


@functools.cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """The pool of one process: threads do not survive a fork."""
    return ThreadPoolExecutor(count, thread_name_prefix="soft-dtw")


def evaluate(
    x: Tensor, y: Tensor, gamma: float, *, divergence: bool, scale: float, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and gradients of ``scale`` times the soft-DTW or its divergence.

    Args:
        x, y: series on the CPU, [B, N, K] and [B, M, K], float32 or float64.
        gamma: smoothing, above 0.
        divergence: subtract half of both self terms.
        scale: factor on value and gradients.
        want_x, want_y: which gradients to compute.

    Returns:
        value [B], and the gradient of each value with respect to its series, shaped like x and y, or None.
    """
    x, y = x.detach(), y.detach()
    if x.stride(2) != 1:
        x = x.contiguous()
    if y.stride(2) != 1:
        y = y.contiguous()
    batch, n, k = x.shape
    m = y.shape[1]
    dtype = x.dtype
    value = torch.empty(batch, dtype=dtype)
    grad_x = torch.empty_like(x) if want_x else None
    grad_y = torch.empty_like(y) if want_y else None
    x_array, y_array = x.numpy(), y.numpy()
    arrays = (
        x_array,
        y_array,
        x_array if grad_x is None else grad_x.numpy(),
        y_array if grad_y is None else grad_y.numpy(),
        value.numpy(),
    )
    options = (want_x, want_y, divergence, gamma, scale)
    kernel = _kernel(dtype)
    lanes = VECTOR_BYTES // dtype.itemsize
    width = -(-k // lanes) * lanes
    short, long = min(n, m), max(n, m)
    table = (2 * long - 1) * long if divergence else (n + m - 1) * short
    rows = 2 * (n + m) * width + 4 * table + 3 * long
    tiles = -(-batch // lanes)

    def work(first: int, stop: int) -> None:
        kernel(*arrays, _scratch.take(dtype, rows), first, stop, *options)

    workers = min(torch.get_num_threads(), tiles)
    if workers == 1 or batch * n * m * (k + 10) < PARALLEL_WORK:
        work(0, tiles)
    else:
        bounds = [tiles * w // workers for w in range(workers + 1)]
        pool = _threads(workers - 1, os.getpid())
        others = [pool.submit(work, bounds[w], bounds[w + 1]) for w in range(1, workers)]
        work(bounds[0], bounds[1])
        for other in others:
            other.result()
    return value, grad_x, grad_y
