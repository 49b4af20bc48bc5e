"""The LIF neuron on CUDA devices: one kernel forwards and one backwards, membranes in registers.

Every program takes a block of neurons through all time steps, which are unrolled; the backward kernel
computes the membranes again from the input. Decay, threshold and slope are compiled in: as arguments they would
arrive in float32. Only the delayed reset lives here. Arithmetic is in float32
(float64 for float64 tensors). Kernels run in Triton's interpreter, on CPU tensors too, if TRITON_INTERPRET=1.

Letters: T time steps, N neurons of one time step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    extra,
    spikes,
    size,
    x_step,
    extra_step,
    DECAY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    T: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < size
    u = tl.zeros((BLOCK,), dtype=STATE)
    for t in tl.static_range(T):
        current = tl.load(x + t * x_step + neuron, mask=inside, other=0.0)
        if HAS_EXTRA:
            # The sum is rounded as it would be if it were stored.
            current = current.to(STATE) + tl.load(extra + t * extra_step + neuron, mask=inside, other=0.0).to(STATE)
            current = current.to(x.dtype.element_ty)
        u = DECAY * u + current.to(STATE) - THRESHOLD * (u > THRESHOLD).to(STATE)
        tl.store(spikes + t * size + neuron, (u > THRESHOLD).to(STATE).to(spikes.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x,
    extra,
    grad,
    out,
    size,
    x_step,
    extra_step,
    grad_step,
    DECAY: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SLOPE: tl.constexpr,
    HEIGHT: tl.constexpr,
    T: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    neuron = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < size
    u = tl.zeros((BLOCK,), dtype=STATE)
    membranes = ()
    for t in tl.static_range(T):
        current = tl.load(x + t * x_step + neuron, mask=inside, other=0.0)
        if HAS_EXTRA:
            current = current.to(STATE) + tl.load(extra + t * extra_step + neuron, mask=inside, other=0.0).to(STATE)
            current = current.to(x.dtype.element_ty)
        u = DECAY * u + current.to(STATE) - THRESHOLD * (u > THRESHOLD).to(STATE)
        membranes = membranes + (u,)  # type: ignore[assignment]  # noqa: RUF005
    g = tl.zeros((BLOCK,), dtype=STATE)
    for back in tl.static_range(T):
        q = SLOPE * (membranes[T - 1 - back] - THRESHOLD)
        incoming = tl.load(grad + (T - 1 - back) * grad_step + neuron, mask=inside, other=0.0).to(STATE)
        g = 1.0 / (1.0 + q * q) * HEIGHT * incoming + DECAY * g
        tl.store(out + (T - 1 - back) * size + neuron, g.to(out.dtype.element_ty), mask=inside)


STATE_TYPES = {torch.float64: tl.float64}


def _dense_steps(x: Tensor) -> Tensor:
    """``x`` [T, ...] itself if its steps are contiguous, else a copy; repeated steps stay repeated."""
    if x[0].is_contiguous():
        return x
    return x[:1].contiguous().expand_as(x) if x.stride(0) == 0 else x.contiguous()


def _memory_order(x: Tensor) -> list[int]:
    """Dimensions with time first and the rest as they lie in memory, so that channels last needs no copy."""
    return [0, *sorted(range(1, x.ndim), key=lambda dim: x.stride(dim), reverse=True)]


def _launch(kernel: Any, size: int, *arguments: Any, **constants: Any) -> None:
    # A product and a sum fused into one rounding would differ from the other back ends in the last bit.
    kernel[(-(-size // BLOCK),)](*arguments, **constants, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)


def lif_forward(x: Tensor, extra: Tensor | None, decay: float, threshold: float) -> Tensor:
    """Spikes of the current ``x`` (plus ``extra``), both [T, ...]; the result lies in memory like ``x``."""
    order = _memory_order(x)
    x = _dense_steps(x.permute(order))
    other = x if extra is None else _dense_steps(extra.permute(order))
    spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    steps, size = x.shape[0], x[0].numel()
    if size:
        _launch(
            _forward_kernel,
            size,
            x,
            other,
            spikes,
            size,
            x.stride(0),
            other.stride(0),
            DECAY=decay,
            THRESHOLD=threshold,
            T=steps,
            HAS_EXTRA=extra is not None,
            STATE=STATE_TYPES.get(x.dtype, tl.float32),
        )
    return spikes.permute(_inverse(order))


def lif_backward(grad: Tensor, x: Tensor, extra: Tensor | None, decay: float, threshold: float, slope: float) -> Tensor:
    """Gradient of the current [T, ...] from that of the spikes; ``slope`` is pi/2 * alpha."""
    order = _memory_order(x)
    x, grad = _dense_steps(x.permute(order)), _dense_steps(grad.permute(order))
    other = x if extra is None else _dense_steps(extra.permute(order))
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    steps, size = x.shape[0], x[0].numel()
    if size:
        _launch(
            _backward_kernel,
            size,
            x,
            other,
            grad,
            result,
            size,
            x.stride(0),
            other.stride(0),
            grad.stride(0),
            DECAY=decay,
            THRESHOLD=threshold,
            SLOPE=slope,
            HEIGHT=slope / math.pi,
            T=steps,
            HAS_EXTRA=extra is not None,
            STATE=STATE_TYPES.get(x.dtype, tl.float32),
        )
    return result.permute(_inverse(order))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
