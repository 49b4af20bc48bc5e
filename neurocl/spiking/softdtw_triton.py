"""Fused CUDA kernel for soft-DTW of short series: distances, recursion and gradient in one launch.

One program handles one sample. Its cost matrix stays in registers, one row of it per time step of the first
series; the recursion goes over anti-diagonals, so that all rows advance together and a neighbour's value comes from
a shuffle. The softmin weights go to a small buffer between the forward and the backward sweep. For each
diagonal a row looks its cost up by a masked sum over its columns, which is why the kernel is for short series.

Legend: B batch, N and M time steps of the two series, K features; BN, BM, BK the powers of two that cover them.
"""

# triton reads the annotations of a kernel's arguments, so they stay objects and only mark constants
# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_STEPS = 32


@triton.jit
def _costs(
    a, b, stride_at, stride_ak, stride_bt, stride_bk, n, m, k, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    i = tl.arange(0, BN)
    j = tl.arange(0, BM)
    total = tl.zeros((BN, BM), dtype=a.dtype.element_ty)
    for start in range(0, k, BK):
        f = start + tl.arange(0, BK)
        a_mask = (i[:, None] < n) & (f[None, :] < k)
        b_mask = (j[:, None] < m) & (f[None, :] < k)
        rows = tl.load(a + i[:, None] * stride_at + f[None, :] * stride_ak, mask=a_mask, other=0.0)
        columns = tl.load(b + j[:, None] * stride_bt + f[None, :] * stride_bk, mask=b_mask, other=0.0)
        difference = rows[:, None, :] - columns[None, :, :]
        total += tl.sum(difference * difference, axis=2)
    return total * 0.5


@triton.jit
def _align(cost, weights, n, m, gamma, seed, WANT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Value, and (if wanted) ``seed`` times the expected alignment, of one cost matrix."""
    i = tl.arange(0, BN)
    j = tl.arange(0, BM)
    infinity = tl.full((BN,), float("inf"), dtype=cost.dtype)
    lower = tl.maximum(i - 1, 0)
    upper = tl.minimum(i + 1, BN - 1)
    last = infinity
    before = infinity
    for d in range(n + m - 1):
        column = d - i
        valid = (i < n) & (column >= 0) & (column < m)
        here = tl.sum(tl.where(j[None, :] == column[:, None], cost, 0.0), axis=1)
        above = tl.where(i == 0, infinity, tl.gather(last, lower, 0))
        corner = tl.where(i == 0, infinity, tl.gather(before, lower, 0))
        corner = tl.where((i == 0) & (d == 0), 0.0, corner)
        least = tl.where(valid, tl.minimum(tl.minimum(last, above), corner), 0.0)
        exp_left = tl.where(valid, tl.exp((least - last) / gamma), 0.0)
        exp_above = tl.where(valid, tl.exp((least - above) / gamma), 0.0)
        exp_corner = tl.where(valid, tl.exp((least - corner) / gamma), 0.0)
        norm = tl.where(valid, exp_left + exp_above + exp_corner, 1.0)
        if WANT:
            slot = weights + d * 3 * BN + i
            tl.store(slot, exp_left / norm)
            tl.store(slot + BN, exp_above / norm)
            tl.store(slot + 2 * BN, exp_corner / norm)
        before = last
        last = tl.where(valid, here + least - gamma * tl.log(norm), infinity)
    value = tl.sum(tl.where(i == n - 1, last, 0.0), axis=0)

    alignment = tl.zeros((BN, BM), dtype=cost.dtype)
    if WANT:
        # a later load may be done by another thread than the store was
        tl.debug_barrier()
        expected = tl.where(i == n - 1, seed + tl.zeros((BN,), dtype=cost.dtype), 0.0)
        from_corner = tl.zeros((BN,), dtype=cost.dtype)
        for step in range(n + m - 1):
            d = n + m - 2 - step
            alignment = tl.where(j[None, :] == (d - i)[:, None], expected[:, None], alignment)
            slot = weights + d * 3 * BN + i
            to_left = expected * tl.load(slot)
            to_above = expected * tl.load(slot + BN)
            to_corner = expected * tl.load(slot + 2 * BN)
            expected = from_corner + to_left + tl.where(i == BN - 1, 0.0, tl.gather(to_above, upper, 0))
            from_corner = tl.where(i == BN - 1, 0.0, tl.gather(to_corner, upper, 0))
    return value, alignment


@triton.jit
def _sample(
    x,
    y,
    value,
    grad_x,
    grad_y,
    weights,
    stride_xb,
    stride_xt,
    stride_xk,
    stride_yb,
    stride_yt,
    stride_yk,
    stride_gxb,
    stride_gxt,
    stride_gxk,
    stride_gyb,
    stride_gyt,
    stride_gyk,
    n,
    m,
    k,
    weights_per_term,
    gamma_high,
    gamma_low,
    scale_high,
    scale_low,
    DIVERGENCE: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_Y: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    x += b * stride_xb
    y += b * stride_yb
    weights += b * weights_per_term * 3
    real = x.dtype.element_ty
    # numbers arrive in single precision: two of them make a double
    gamma = tl.full((), gamma_high, real) + tl.full((), gamma_low, real)
    scale = tl.full((), scale_high, real) + tl.full((), scale_low, real)

    cost = _costs(x, y, stride_xt, stride_xk, stride_yt, stride_yk, n, m, k, BN, BM, BK)
    total, e_xy = _align(cost, weights, n, m, gamma, scale, WANT_X or WANT_Y, BN, BM)
    if DIVERGENCE:
        # both arguments of S(x, x) move with x, and it counts one half: the seed is one
        cost_x = _costs(x, x, stride_xt, stride_xk, stride_xt, stride_xk, n, n, k, BN, BN, BK)
        value_x, e_xx = _align(cost_x, weights + weights_per_term, n, n, gamma, scale, WANT_X, BN, BN)
        cost_y = _costs(y, y, stride_yt, stride_yk, stride_yt, stride_yk, m, m, k, BM, BM, BK)
        value_y, e_yy = _align(cost_y, weights + 2 * weights_per_term, m, m, gamma, scale, WANT_Y, BM, BM)
        total = total - 0.5 * value_x - 0.5 * value_y
    tl.store(value + b, scale * total)

    if WANT_X or WANT_Y:
        i = tl.arange(0, BN)
        j = tl.arange(0, BM)
        for start in range(0, k, BK):
            f = start + tl.arange(0, BK)
            x_mask = (i[:, None] < n) & (f[None, :] < k)
            y_mask = (j[:, None] < m) & (f[None, :] < k)
            x_rows = tl.load(x + i[:, None] * stride_xt + f[None, :] * stride_xk, mask=x_mask, other=0.0)
            y_rows = tl.load(y + j[:, None] * stride_yt + f[None, :] * stride_yk, mask=y_mask, other=0.0)
            pull = e_xy[:, :, None] * (x_rows[:, None, :] - y_rows[None, :, :])
            if WANT_X:
                grad = tl.sum(pull, axis=1)
                if DIVERGENCE:
                    # the alignment of a series with itself is symmetric, so summing over axis 0 does as well
                    grad += tl.sum(e_xx[:, :, None] * (x_rows[:, None, :] - x_rows[None, :, :]), axis=0)
                target = grad_x + b * stride_gxb + i[:, None] * stride_gxt + f[None, :] * stride_gxk
                tl.store(target, grad, mask=x_mask)
            if WANT_Y:
                grad = -tl.sum(pull, axis=0)
                if DIVERGENCE:
                    grad += tl.sum(e_yy[:, :, None] * (y_rows[:, None, :] - y_rows[None, :, :]), axis=0)
                target = grad_y + b * stride_gyb + j[:, None] * stride_gyt + f[None, :] * stride_gyk
                tl.store(target, grad, mask=y_mask)


def fits(x: Tensor, y: Tensor) -> bool:
    """Whether the kernel takes series of these lengths."""
    return max(x.shape[1], y.shape[1]) <= MAX_STEPS


def _block(size: int) -> int:
    return max(2, 1 << (size - 1).bit_length())


def _split(number: float) -> tuple[float, float]:
    """The number rounded to single precision, and what that leaves."""
    high = float(torch.tensor(number, dtype=torch.float32))
    return high, number - high


def evaluate(
    x: Tensor, y: Tensor, gamma: float, *, divergence: bool, scale: float, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and gradients of ``scale`` times the soft-DTW or its divergence.

    Args:
        x, y: series on a CUDA device, [B, N, K] and [B, M, K], float32 or float64, N and M at most `MAX_STEPS`.
        gamma: smoothing, above 0.
        divergence: subtract half of both self terms.
        scale: factor on value and gradients.
        want_x, want_y: which gradients to compute.

    Returns:
        value [B], and the gradient of each value with respect to its series, shaped like x and y, or None.
    """
    x, y = x.detach(), y.detach()
    batch, n, k = x.shape
    m = y.shape[1]
    value = x.new_empty(batch)
    grad_x = torch.empty_like(x) if want_x else None
    grad_y = torch.empty_like(y) if want_y else None
    if batch == 0:
        return value, grad_x, grad_y
    block_n, block_m = _block(n), _block(m)
    square = max(block_n, block_m) ** 2
    warps = 1 if square <= 64 else 4
    # a block of differences takes at most 32 registers of each thread
    block_k = min(_block(k), 32, 1024 * warps // square)
    weights_per_term = 3 * (2 * max(n, m) - 1) * max(block_n, block_m)
    weights = x.new_empty(batch * 3 * weights_per_term if want_x or want_y else 0)
    out_x = x if grad_x is None else grad_x
    out_y = y if grad_y is None else grad_y
    _sample[(batch,)](
        x,
        y,
        value,
        out_x,
        out_y,
        weights,
        *x.stride(),
        *y.stride(),
        *out_x.stride(),
        *out_y.stride(),
        n,
        m,
        k,
        weights_per_term,
        *_split(gamma),
        *_split(scale),
        DIVERGENCE=divergence,
        WANT_X=want_x,
        WANT_Y=want_y,
        BN=block_n,
        BM=block_m,
        BK=block_k,
        num_warps=warps,
    )
    return value, grad_x, grad_y
