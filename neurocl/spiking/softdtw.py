"""Soft-DTW and its divergence between batches of series, with a hand-written gradient.

The cost of matching two steps is HALF their squared Euclidean distance, as in STAER. Raw soft-DTW may be
negative and is not zero for equal series; the divergence is never negative and zero for equal series: use it
as a loss.

Value and gradient are computed together in the forward call, by one of three kernels of one signature:
`softdtw_numba` (CPU), `softdtw_triton` (CUDA) and `softdtw_torch` (anywhere, the reference).

Legend: B batch, T1 and T2 time steps of the two series, K features.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from neurocl.spiking import softdtw_torch

Backend = Literal["auto", "torch", "numba", "triton"]
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Kernel = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


@functools.cache
def _kernel_module(name: str) -> Any:
    # numba takes a second to import and triton needs a GPU machine: only for those who use them
    return importlib.import_module(f"neurocl.spiking.softdtw_{name}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _choose_kernel(x: Tensor, y: Tensor, backend: str) -> Kernel:
    device = x.device.type
    if backend == "auto":
        if device == "cpu":
            backend = "numba"
        elif device == "cuda" and _has_triton() and _kernel_module("triton").fits(x, y):
            backend = "triton"
        else:
            backend = "torch"
    elif backend not in ("torch", "numba", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch', 'numba' or 'triton', got {backend!r}")
    elif backend == "numba" and device != "cpu":
        raise ValueError(f"backend 'numba' runs on the CPU, got tensors on {device}; use 'auto' or 'torch'")
    elif backend == "triton":
        if device != "cuda":
            raise ValueError(f"backend 'triton' runs on CUDA, got tensors on {device}; use 'auto' or 'torch'")
        if not _has_triton():
            raise ValueError("backend 'triton' needs the triton package, which is not installed; use 'auto'")
        if not _kernel_module("triton").fits(x, y):
            longest = _kernel_module("triton").MAX_STEPS
            raise ValueError(
                f"backend 'triton' takes series of at most {longest} steps, "
                f"got {x.shape[1]} and {y.shape[1]}; use 'auto' or 'torch'"
            )
    kernel: Kernel = _kernel_module(backend).evaluate
    return kernel


def _check_series(x: Tensor, y: Tensor) -> None:
    if x.dim() != 3 or y.dim() != 3:
        raise ValueError(f"series must be [B, T, K], got {list(x.shape)} and {list(y.shape)}")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"the two batches must agree in B and K of [B, T, K], got {list(x.shape)} and {list(y.shape)}")
    if 0 in x.shape[1:] or 0 in y.shape[1:]:
        raise ValueError(f"series must have at least one step and one feature, got {list(x.shape)} and {list(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            "the two batches must have one dtype and one device, "
            f"got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"series must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check_gamma(gamma: float) -> float:
    gamma = float(gamma)
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"gamma must be above 0 and finite, got {gamma}")
    return gamma


def _refuse_second_derivative() -> None:
    # the saved gradients are constants: a second derivative through them would be silently wrong
    if torch.is_grad_enabled():
        raise RuntimeError("soft-DTW can be differentiated only once: call backward without create_graph=True")


class _SoftDTW(torch.autograd.Function):
    """Runs a kernel forward, keeping the gradients of the values; backward is one multiplication each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, kernel: Kernel, gamma: float, divergence: bool, scale: float) -> Tensor:
        want_x, want_y, *_ = ctx.needs_input_grad
        value, grad_x, grad_y = kernel(x, y, gamma, divergence=divergence, scale=scale, want_x=want_x, want_y=want_y)
        ctx.save_for_backward(grad_x, grad_y)
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        grad_x, grad_y = ctx.saved_tensors
        factor = grad_value.view(-1, 1, 1)
        return (
            None if grad_x is None else grad_x * factor,
            None if grad_y is None else grad_y * factor,
            None,
            None,
            None,
            None,
        )


def _run(x: Tensor, y: Tensor, gamma: float, backend: str, divergence: bool, scale: float) -> Tensor:
    _check_series(x, y)
    gamma = _check_gamma(gamma)
    if x.dtype in (torch.bfloat16, torch.float16):
        x, y = x.float(), y.float()
    kernel = _choose_kernel(x, y, backend)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        result: Tensor = _SoftDTW.apply(  # type: ignore[no-untyped-call]
            x, y, kernel, gamma, divergence, scale
        )
        return result
    return kernel(x, y, gamma, divergence=divergence, scale=scale, want_x=False, want_y=False)[0]


def soft_dtw(x: Tensor, y: Tensor, gamma: float = 1.0, *, backend: Backend = "auto") -> Tensor:
    """Soft-DTW of each pair of series, over half squared Euclidean distances.

    Args:
        x: first series, [B, T1, K], float32 or float64, any strides; bfloat16 and float16 count in float32.
        y: second series, [B, T2, K], of the same dtype and device.
        gamma: smoothing, in units of the cost; towards 0 the value tends to classical DTW.
        backend: "numba" (CPU), "triton" (CUDA, short series), "torch" (any device), or "auto" to choose.

    Returns:
        [B], differentiable once with respect to x and y; gradients are computed only where required.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, an empty series, gamma not above 0, or a
            backend that cannot run on these tensors.

    Reference: Cuturi and Blondel, "Soft-DTW: a differentiable loss function for time-series", ICML 2017.
    """
    return _run(x, y, gamma, backend, False, 1.0)


def soft_dtw_divergence(
    x: Tensor,
    y: Tensor,
    gamma: float = 1.0,
    *,
    normalize: bool = True,
    reduction: Literal["mean", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """S(x, y) - S(x, x) / 2 - S(y, y) / 2: never negative, and zero for equal series.

    Args:
        x: first series, [B, T1, K], float32 or float64, any strides; bfloat16 and float16 count in float32.
        y: second series, [B, T2, K], of the same dtype and device.
        gamma: smoothing, in units of the cost.
        normalize: divide by the mean length (T1 + T2) / 2.
        reduction: "mean" over the batch, or "none" for one value per sample.
        backend: as in `soft_dtw`.

    Returns:
        a scalar, or [B] without reduction; differentiable once with respect to x and y.

    Raises:
        ValueError: as `soft_dtw`, or B = 0, or an unknown reduction.

    Reference: Blondel, Mensch and Vert, "Differentiable divergences between time series", AISTATS 2021; the
        length normalisation is STAER's.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if x.dim() > 0 and x.shape[0] == 0:
        raise ValueError("the batch must hold at least one pair of series, got B = 0")
    scale = 2.0 / (x.shape[1] + y.shape[1]) if normalize and x.dim() == y.dim() == 3 else 1.0
    value = _run(x, y, gamma, backend, True, scale)
    return value.mean() if reduction == "mean" else value


class _SoftDTWFromCost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cost: Tensor, gamma: float) -> Tensor:
        value, alignment = softdtw_torch.align(cost, gamma, want_alignment=ctx.needs_input_grad[0])
        ctx.save_for_backward(alignment)
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, None]:
        _refuse_second_derivative()
        (alignment,) = ctx.saved_tensors
        return alignment * grad_value.view(-1, 1, 1), None


def soft_dtw_from_cost(cost: Tensor, gamma: float = 1.0) -> Tensor:
    """Soft-DTW of given cost matrices, for costs other than half squared distances.

    Args:
        cost: [B, M, N], float32 or float64, on any device; finite.
        gamma: smoothing, in units of the cost.

    Returns:
        [B], differentiable once; the gradient is the expected alignment.

    Raises:
        ValueError: not a batch of non-empty floating point matrices, or gamma not above 0.

    Reference: Cuturi and Blondel, "Soft-DTW: a differentiable loss function for time-series", ICML 2017.
    """
    if cost.dim() != 3 or 0 in cost.shape[1:] or cost.dtype not in _DTYPES:
        raise ValueError(
            f"cost must be floating point [B, M, N] with M, N at least 1, got {cost.dtype} {list(cost.shape)}"
        )
    gamma = _check_gamma(gamma)
    if cost.dtype in (torch.bfloat16, torch.float16):
        cost = cost.float()
    result: Tensor = _SoftDTWFromCost.apply(cost, gamma)  # type: ignore[no-untyped-call]
    return result


def soft_dtw_alignment(x: Tensor, y: Tensor, gamma: float = 1.0) -> Tensor:
    """Expected alignment E of each pair of series: how likely each pair of steps is matched.

    Args:
        x: first series, [B, T1, K].
        y: second series, [B, T2, K], of the same dtype and device.
        gamma: smoothing, in units of the cost.

    Returns:
        [B, T1, T2], entries in [0, 1], both corners 1; a constant for autograd.

    Raises:
        ValueError: as `soft_dtw`.

    Reference: Cuturi and Blondel, "Soft-DTW: a differentiable loss function for time-series", ICML 2017.
    """
    _check_series(x, y)
    gamma = _check_gamma(gamma)
    if x.dtype in (torch.bfloat16, torch.float16):
        x, y = x.float(), y.float()
    with torch.no_grad():
        cost = softdtw_torch.half_squared_distances(x, y)
        _, alignment = softdtw_torch.align(cost, gamma, want_alignment=True)
    assert alignment is not None
    return alignment
