"""Soft-DTW in plain torch, one vectorised step per anti-diagonal: the reference, and the way on any device.

Cell (i, j) of the recursion needs (i, j-1), (i-1, j) and (i-1, j-1), which lie on the two anti-diagonals
before its own, so the cells of one diagonal d = i + j are computed together. The backward sweep is written by
hand: autograd through the infinite border would give NaN.

Legend: B batch, M and N time steps of the two series, K features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def align(cost: Tensor, gamma: float, *, want_alignment: bool) -> tuple[Tensor, Tensor | None]:
    """Soft-DTW of cost matrices [B, M, N]: values [B] and, if wanted, their gradients [B, M, N].

    The gradient of a value with respect to its cost matrix is the expected alignment.

    Reference: Cuturi and Blondel, "Soft-DTW: a differentiable loss function for time-series", ICML 2017,
        algorithms 1 and 2.
    """
    batch, m, n = cost.shape
    # anti-diagonals are the diagonals of the matrix with its columns reversed
    flipped = cost.flip(2)
    weights: list[Tensor] = []
    # values of two diagonals ago and of the last one; entry i + 1 belongs to row i, entry 0 is the border
    before = cost.new_full((batch, m + 1), torch.inf)
    before[:, 0] = 0.0
    last = torch.full_like(before, torch.inf)
    for d in range(m + n - 1):
        start, stop = max(0, d - n + 1), min(m, d + 1)
        left, above, corner = last[:, start + 1 : stop + 1], last[:, start:stop], before[:, start:stop]
        scores = torch.stack((left, above, corner)).mul_(-1.0 / gamma)
        log_norm = torch.logsumexp(scores, dim=0)
        now = torch.full_like(last, torch.inf)
        now[:, start + 1 : stop + 1] = flipped.diagonal(n - 1 - d, 1, 2) - gamma * log_norm
        if want_alignment:
            weights.append(scores.sub_(log_norm).exp_())
        before, last = last, now
    value = last[:, m]
    if not want_alignment:
        return value, None

    alignment = torch.empty_like(flipped)
    # what the cells of a diagonal pass on to the last diagonal and to the one before it, by row (entry i + 1)
    to_last = cost.new_zeros(batch, m + 1)
    to_before = cost.new_zeros(batch, m + 1)
    to_last[:, m] = 1.0
    for d in range(m + n - 2, -1, -1):
        start, stop = max(0, d - n + 1), min(m, d + 1)
        expected = to_last[:, start + 1 : stop + 1]
        alignment.diagonal(n - 1 - d, 1, 2).copy_(expected)
        left, above, corner = weights[d] * expected
        to_last, to_before = to_before, torch.zeros_like(to_last)
        to_last[:, start + 1 : stop + 1] += left
        to_last[:, start:stop] += above
        to_before[:, start:stop] += corner
    return value, alignment.flip(2)


def half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 / 2 of series [B, M, K] and [B, N, K]: [B, M, N], free of the Gram trick's cancellation."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_().mul_(0.5)


def _value_and_gradients(
    x: Tensor, y: Tensor, gamma: float, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    value, alignment = align(half_squared_distances(x, y), gamma, want_alignment=want_x or want_y)
    grad_x = grad_y = None
    if alignment is not None and want_x:
        grad_x = alignment.sum(2, keepdim=True) * x - alignment @ y
    if alignment is not None and want_y:
        grad_y = alignment.sum(1).unsqueeze(2) * y - alignment.mT @ x
    return value, grad_x, grad_y


def evaluate(
    x: Tensor, y: Tensor, gamma: float, *, divergence: bool, scale: float, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and gradients of ``scale`` times the soft-DTW or its divergence.

    Args:
        x, y: series [B, M, K] and [B, N, K] on one device, float32 or float64.
        gamma: smoothing, above 0.
        divergence: subtract half of both self terms.
        scale: factor on value and gradients.
        want_x, want_y: which gradients to compute.

    Returns:
        value [B], and the gradient of each value with respect to its series, shaped like x and y, or None.
    """
    # autocast would multiply matrices in half precision
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        value, grad_x, grad_y = _value_and_gradients(x, y, gamma, want_x, want_y)
        if divergence:
            # both arguments of S(x, x) move with x, and it counts one half: one whole gradient is subtracted
            value_xx, grad_xx, _ = _value_and_gradients(x, x, gamma, want_x, False)
            value_yy, grad_yy, _ = _value_and_gradients(y, y, gamma, want_y, False)
            value = value - 0.5 * (value_xx + value_yy)
            grad_x = None if grad_x is None or grad_xx is None else grad_x - grad_xx
            grad_y = None if grad_y is None or grad_yy is None else grad_y - grad_yy
        if scale != 1.0:
            value = value * scale
            grad_x = None if grad_x is None else grad_x * scale
            grad_y = None if grad_y is None else grad_y * scale
    return value, grad_x, grad_y
