"""The leaky integrate-and-fire neuron: a stateless function over time steps, alone or fused with BatchNorm.

The membrane u starts at 0 and every step charges, compares and (later) resets:

    u[t] = decay * u[t-1] + x[t] - threshold * 1[u[t-1] > threshold]        reset="delayed"
    u[t] = decay * (u[t-1] - threshold * 1[u[t-1] > threshold]) + x[t]      reset="immediate"
    u[t] = decay * u[t-1] * 1[u[t-1] <= threshold] + x[t]                   reset="hard"
    s[t] = 1[u[t] > threshold]                                              strictly above

The gradient of s with respect to u is replaced by alpha/2 / (1 + (pi/2 * alpha * (u - threshold))^2), which is
1 / (1 + (pi * (u - threshold))^2) at the default alpha = 2; it flows through the charging (``decay * u`` and ``x``)
and not through the reset signal. Every backward pass computes the membranes again from the input, so the input is
all that is kept between the two passes.

Letters: T time steps, B batch, C channels, K samples behind one channel's statistics.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Reset = Literal["delayed", "immediate", "hard"]
Backend = Literal["auto", "torch", "numba", "triton"]

RESETS = ("delayed", "immediate", "hard")
SURROGATES = ("atan",)
BACKENDS = ("auto", "torch", "numba", "triton")


def lif(
    current: Tensor,
    *,
    decay: float | Tensor = 0.5,
    threshold: float | Tensor = 1.0,
    reset: Reset = "delayed",
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: Backend = "auto",
) -> Tensor:
    """Spikes of a layer of LIF neurons that starts at rest.

    Args:
        current: input current [T, ...]; a step repeated with ``expand`` is read, and kept for the backward
            pass, without being copied.
        decay: factor of the membrane from one step to the next, 0 to 1; a 0-d tensor that requires a gradient
            gets one.
        threshold: membrane above which a neuron fires, positive; a 0-d tensor as for ``decay``.
        reset: ``"delayed"`` subtracts the threshold one step later, not decayed; ``"immediate"`` at once, so
            that it decays; ``"hard"`` sets the membrane to zero at once.
        surrogate: shape of the surrogate gradient; ``"atan"``.
        alpha: sharpness of the surrogate gradient.
        backend: ``"torch"`` is the plain time loop, for every device, dtype and reset; ``"numba"`` (CPU) and
            ``"triton"`` (CUDA) are fused kernels for the delayed reset with constant decay and threshold;
            ``"auto"`` takes a fused one where it can.

    Returns: spikes 0 or 1 [T, ...], in the dtype and memory format of ``current``.
    Raises: ValueError if an argument has no such value or ``backend`` can't do what is asked.
    Reference: Fang et al., "Incorporating learnable membrane time constant", ICCV 2021 (arctan surrogate).
    """
    _check(current, decay, threshold, reset, surrogate, alpha, backend)
    chosen = _choose(current, decay, threshold, reset, backend)
    if chosen == "torch":
        return _apply(_TorchLif, current, decay, threshold, reset, _slope(alpha))
    constants = (float(decay), float(threshold), _slope(alpha), chosen)
    return _apply(_FusedLif, current, None, *constants)


def lif_residual(
    a: Tensor,
    b: Tensor,
    *,
    decay: float | Tensor = 0.5,
    threshold: float | Tensor = 1.0,
    reset: Reset = "delayed",
    surrogate: str = "atan",
    alpha: float = 2.0,
    backend: Backend = "auto",
) -> Tensor:
    """``lif(a + b)`` for two tensors [T, ...] of one shape; the fused kernels never store the sum.

    Takes, returns and raises what ``lif`` does, and ValueError if the shapes or dtypes differ.
    """
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"a and b must have one shape, dtype and device, got {tuple(a.shape)} {a.dtype} on {a.device} "
            f"and {tuple(b.shape)} {b.dtype} on {b.device}"
        )
    _check(a, decay, threshold, reset, surrogate, alpha, backend)
    chosen = _choose(a, decay, threshold, reset, backend)
    if chosen == "torch":
        return _apply(_TorchLif, a + b, decay, threshold, reset, _slope(alpha))
    constants = (float(decay), float(threshold), _slope(alpha), chosen)
    return _apply(_FusedLif, a, b, *constants)


def lif_membrane(
    current: Tensor,
    *,
    decay: float | Tensor = 0.5,
    threshold: float | Tensor = 1.0,
    reset: Reset = "delayed",
    surrogate: str = "atan",
    alpha: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Spikes and membranes [T, ...] of ``lif``: the membrane is the one that is compared with the threshold.

    A plain loop that autograd records step by step, for study and plots; both results carry gradients.
    """
    _check(current, decay, threshold, reset, surrogate, alpha, "torch")
    membrane = torch.zeros_like(current[0])
    spikes, membranes = [], []
    for x in current:
        fired = (membrane > threshold).to(current.dtype)
        membrane = _charge(membrane, fired, x, decay, threshold, reset)
        membranes.append(membrane)
        spikes.append(_apply(_Fire, membrane - threshold, _slope(alpha)))
    return torch.stack(spikes), torch.stack(membranes)


def norm_lif(
    x: Tensor,
    norm: nn.BatchNorm1d | nn.BatchNorm2d,
    *,
    timesteps: int,
    decay: float | Tensor = 0.5,
    threshold: float | Tensor = 1.0,
    reset: Reset = "delayed",
    alpha: float = 2.0,
    shortcut: Tensor | None = None,
    repeat: int = 1,
    track: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Spikes of ``lif(norm(x) + shortcut)``, with time folded into the batch.

    On CPUs this is one operation that keeps ``x`` (and ``shortcut``) for the backward pass and nothing else;
    normalised values and membranes are computed again. Elsewhere it is ``norm`` and then ``lif``.

    Args:
        x: output of a convolution or linear layer [T*B, C, ...], time first; contiguous or channels last.
        norm: BatchNorm module; its mode, affine parameters and running statistics are used as its own
            ``forward`` would.
        timesteps: T.
        decay, threshold, reset, alpha, backend: as for ``lif``.
        shortcut: added to the normalised values before the neurons, [T*B, C, ...].
        repeat: T if ``x`` is [B, C, ...] and stands for the same current at all steps, else 1. Gradients and
            running variance are those of ``x`` repeated T times.
        track: False leaves the running statistics as they are, in training mode too.

    Returns: spikes [T*B, C, ...] in the dtype and memory format of ``x``.
    Raises: ValueError if sizes don't fit or one channel has a single value to take statistics of.
    Reference: Ioffe and Szegedy, "Batch normalization", 2015; Zheng et al., "Going deeper with directly-trained
        larger spiking neural networks", 2021 (statistics over time and batch).
    """
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}")
    if repeat not in (1, timesteps):
        raise ValueError(f"repeat must be 1 or timesteps ({timesteps}), got {repeat}")
    if x.ndim < 2 or x.shape[1] != norm.num_features:
        raise ValueError(f"x must be [T*B, {norm.num_features}, ...], got {tuple(x.shape)}")
    rows = x.shape[0] * repeat
    if rows == 0 or rows % timesteps:
        raise ValueError(f"x has {rows} rows, not a positive multiple of {timesteps} time steps")
    if shortcut is not None and shortcut.shape != (rows, *x.shape[1:]):
        raise ValueError(f"shortcut must be {(rows, *x.shape[1:])}, got {tuple(shortcut.shape)}")
    _check(x, decay, threshold, reset, "atan", alpha, backend)
    repeated = repeat > 1
    chosen = _choose(x, decay, threshold, reset, backend)
    fused = (
        chosen == "numba"
        and x.numel() > 0
        and not (repeated and shortcut is not None)
        and (shortcut is None or shortcut.dtype == x.dtype)
        and _parameter_dtypes(norm) <= {x.dtype, torch.float32}
    )
    if not fused:
        y = _normalise(x, norm, repeat, track)
        if repeated:
            y = y.expand(timesteps, *y.shape)
        else:
            y = y.unflatten(0, (timesteps, -1))
        options: dict[str, Any] = {"decay": decay, "threshold": threshold, "reset": reset, "alpha": alpha}
        options["backend"] = backend
        if shortcut is None:
            return lif(y, **options).flatten(0, 1)
        return lif_residual(y, shortcut.unflatten(0, (timesteps, -1)), **options).flatten(0, 1)
    constants = (float(decay), float(threshold), _slope(alpha))
    return _apply(_NormLif, x, norm.weight, norm.bias, shortcut, norm, timesteps, repeated, track, *constants)


def _apply(function: Any, *arguments: Any) -> Tensor:
    return cast(Tensor, function.apply(*arguments))


def _slope(alpha: float) -> float:
    return math.pi / 2 * alpha


def _surrogate(v: Tensor, slope: float) -> Tensor:
    """Derivative that stands in for the spike's, ``v`` above the threshold."""
    return 1 / (1 + (slope * v).square()) * (slope / math.pi)


def _check(
    current: Tensor,
    decay: float | Tensor,
    threshold: float | Tensor,
    reset: str,
    surrogate: str,
    alpha: float,
    backend: str,
) -> None:
    for name, value, choices in (
        ("reset", reset, RESETS),
        ("surrogate", surrogate, SURROGATES),
        ("backend", backend, BACKENDS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
    if not isinstance(threshold, Tensor) and not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    for name, constant in (("decay", decay), ("threshold", threshold)):
        if isinstance(constant, Tensor) and constant.ndim:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(constant.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not current.is_floating_point():
        raise ValueError(f"current must be a floating-point tensor, got {current.dtype}")
    if current.ndim < 1 or current.shape[0] < 1:
        raise ValueError(f"current must be [T, ...] with at least one time step, got {tuple(current.shape)}")


@cache
def _has_triton() -> bool:
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return False
    # The kernels keep membranes in tuples, which Triton compiles since 3.3.
    return (int(major), int(minor)) >= (3, 3)


def _choose(current: Tensor, decay: float | Tensor, threshold: float | Tensor, reset: str, backend: Backend) -> Backend:
    """The back end that runs: ``backend`` itself, or what suits the tensors if it is ``"auto"``."""
    if backend == "torch":
        return backend
    needs = [value for value in (decay, threshold) if isinstance(value, Tensor)]
    learnable = torch.is_grad_enabled() and any(value.requires_grad for value in needs)
    # Reading a number from an accelerator would make the host wait for it.
    remote = any(value.device.type != "cpu" for value in needs)
    plain = reset == "delayed" and not learnable and not remote
    if backend == "auto":
        if plain and current.device.type == "cpu":
            from neurocl.spiking import lif_numba

            return "numba" if lif_numba.supports(current) else "torch"
        return "triton" if plain and current.device.type == "cuda" and _has_triton() else "torch"
    if not plain:
        raise ValueError(f"backend {backend!r} needs reset='delayed' and constant decay and threshold; use 'torch'")
    if backend == "numba":
        from neurocl.spiking import lif_numba

        if not lif_numba.supports(current):
            raise ValueError(
                f"backend 'numba' takes float32, float64 and bfloat16 on the CPU, "
                f"got {current.dtype} on {current.device}"
            )
    elif not _has_triton():
        raise ValueError("backend 'triton' needs the package triton 3.3 or newer; use 'torch' or 'numba'")
    elif current.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' takes CUDA tensors, got one on {current.device}; use 'torch' or 'numba'")
    return backend


def _charge(
    membrane: Tensor,
    fired: Tensor,
    x: Tensor,
    decay: float | Tensor,
    threshold: float | Tensor,
    reset: Reset,
) -> Tensor:
    """The next membrane from the last one and its spikes (0 or 1, without gradient)."""
    if reset == "delayed":
        return decay * membrane + x - threshold * fired
    if reset == "immediate":
        return decay * (membrane - threshold * fired) + x
    return decay * (membrane * (1 - fired)) + x


class _Fire(torch.autograd.Function):
    """1[v > 0] with the arctan surrogate gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.slope = slope
        return (v > 0).to(v.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return _surrogate(v, ctx.slope) * grad, None


class _TorchLif(torch.autograd.Function):
    """The time loop in torch operations: the reference for the kernels, and all that they can't do."""

    @staticmethod
    def _run(
        current: Tensor, decay: float | Tensor, threshold: float | Tensor, reset: Reset
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Membranes and spikes of all steps, in float32 for tensors of lower precision."""
        dtype = torch.promote_types(current.dtype, torch.float32)
        membrane = torch.zeros_like(current[0], dtype=dtype)
        fired = (membrane > threshold).to(dtype)
        membranes, spikes = [], []
        for x in current:
            membrane = _charge(membrane, fired, x.to(dtype), decay, threshold, reset)
            fired = (membrane > threshold).to(dtype)
            membranes.append(membrane)
            spikes.append(fired)
        return membranes, spikes

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        decay: float | Tensor,
        threshold: float | Tensor,
        reset: Reset,
        slope: float,
    ) -> Tensor:
        learnable = [value if isinstance(value, Tensor) else None for value in (decay, threshold)]
        ctx.save_for_backward(current, *learnable)
        ctx.constants = tuple(None if isinstance(value, Tensor) else value for value in (decay, threshold))
        ctx.reset, ctx.slope = reset, slope
        _, spikes = _TorchLif._run(current, decay, threshold, reset)
        return torch.stack(spikes).to(current.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        current, *learnable = ctx.saved_tensors
        decay, threshold = (
            constant if tensor is None else tensor for tensor, constant in zip(learnable, ctx.constants, strict=True)
        )
        membranes, spikes = _TorchLif._run(current, decay, threshold, ctx.reset)
        grads = []
        carried: Tensor | float = 0.0
        grad_decay = torch.zeros((), dtype=membranes[0].dtype, device=current.device)
        grad_threshold = torch.zeros_like(grad_decay)
        for t in range(len(membranes) - 1, -1, -1):
            surrogate = _surrogate(membranes[t] - threshold, ctx.slope)
            from_spikes = surrogate * grad[t].to(surrogate.dtype)
            through = from_spikes + carried
            grads.append(through)
            carried = decay * through
            grad_threshold -= from_spikes.sum()
            if t == 0:
                break
            held, fired = membranes[t - 1], spikes[t - 1]
            if ctx.reset == "hard":
                held = held * (1 - fired)
                carried = carried * (1 - fired)
            elif ctx.reset == "immediate":
                held = held - threshold * fired
                grad_threshold -= (carried * fired).sum()
            else:
                grad_threshold -= (through * fired).sum()
            grad_decay += (through * held).sum()
        grads.reverse()
        return (
            torch.stack(grads).to(current.dtype),
            grad_decay.to(learnable[0]) if ctx.needs_input_grad[1] else None,
            grad_threshold.to(learnable[1]) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


class _FusedLif(torch.autograd.Function):
    """LIF of ``current`` (+ ``extra``) with the delayed reset, in the kernels of ``backend``."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        extra: Tensor | None,
        decay: float,
        threshold: float,
        slope: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(current, extra)
        ctx.constants = (decay, threshold, slope)
        ctx.kernels = _kernels(backend)
        return cast(Tensor, ctx.kernels.lif_forward(current, extra, decay, threshold))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        current, extra = ctx.saved_tensors
        result = ctx.kernels.lif_backward(grad, current, extra, *ctx.constants)
        return result, None if extra is None else result, None, None, None, None


def _kernels(backend: str) -> Any:
    """The module with the kernels: numba and triton are imported when their first tensor comes."""
    if backend == "numba":
        from neurocl.spiking import lif_numba

        return lif_numba
    from neurocl.spiking import lif_triton

    return lif_triton


class _NormLif(torch.autograd.Function):
    """BatchNorm and LIF of ``x`` [T*B, C, ...] on the CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shortcut: Tensor | None,
        norm: nn.BatchNorm1d | nn.BatchNorm2d,
        timesteps: int,
        repeated: bool,
        track: bool,
        decay: float,
        threshold: float,
        slope: float,
    ) -> Tensor:
        from neurocl.spiking import lif_numba

        channels = lif_numba.channels_of(x)
        if channels is None:
            x = x.contiguous()
            channels = lif_numba.Channels(x.shape[1], x[0, 0].numel())
        batch_statistics = _uses_batch_statistics(norm)
        if batch_statistics:
            samples = x.numel() // channels.count
            if samples * (timesteps if repeated else 1) == 1:
                raise ValueError(f"BatchNorm needs more than one value per channel to train, got {tuple(x.shape)}")
            mean, variance = lif_numba.channel_statistics(x, channels)
            if track and norm.training:
                repeats = timesteps if repeated else 1
                unbiased = variance * (samples * repeats / (samples * repeats - 1))
                _track(norm, torch.from_numpy(mean), torch.from_numpy(unbiased))
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
        ones, zeros = torch.ones(channels.count), torch.zeros(channels.count)
        affine = lif_numba.Affine(
            mean=mean.copy(),
            invstd=(variance + norm.eps) ** -0.5,
            weight=(ones if weight is None else weight.detach()).double().numpy().copy(),
            bias=(zeros if bias is None else bias.detach()).double().numpy().copy(),
        )
        ctx.save_for_backward(x, shortcut)
        ctx.weight_dtype = x.dtype if weight is None else weight.dtype
        ctx.channels, ctx.affine, ctx.batch_statistics = channels, affine, batch_statistics
        ctx.constants = {"steps": timesteps, "repeat": repeated, "decay": decay, "threshold": threshold}
        ctx.slope = slope
        return lif_numba.norm_lif_forward(x, shortcut, channels, affine, **ctx.constants)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from neurocl.spiking import lif_numba

        x, shortcut = ctx.saved_tensors
        grad_x, grad_shortcut, grad_weight, grad_bias = lif_numba.norm_lif_backward(
            grad,
            x,
            shortcut,
            ctx.channels,
            ctx.affine,
            slope=ctx.slope,
            batch_statistics=ctx.batch_statistics,
            **ctx.constants,
        )
        affine_grads = [
            torch.from_numpy(values).to(ctx.weight_dtype) if needed else None
            for values, needed in zip((grad_weight, grad_bias), ctx.needs_input_grad[1:3], strict=True)
        ]
        return grad_x, *affine_grads, grad_shortcut, *[None] * 7


def _parameter_dtypes(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (norm.weight, norm.running_mean) if tensor is not None}


def _uses_batch_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def _track(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, unbiased_variance: Tensor) -> None:
    """Update the running statistics as ``norm`` itself does; without momentum they are plain averages."""
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked)
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased_variance)):
        running.mul_(1 - momentum).add_(value.to(running), alpha=momentum)


def _normalise(x: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d, repeat: int, track: bool) -> Tensor:
    """``norm(x)`` by torch, with the running variance of ``x`` repeated ``repeat`` times."""
    if not _uses_batch_statistics(norm):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    if not (track and norm.training):
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    if repeat == 1:
        return cast(Tensor, norm(x))
    dtype = x.dtype if norm.running_mean is None else norm.running_mean.dtype
    mean, variance = x.new_zeros((2, norm.num_features), dtype=dtype)
    # Momentum 1 writes the statistics of this batch alone into the two buffers.
    y = F.batch_norm(x, mean, variance, norm.weight, norm.bias, True, 1.0, norm.eps)
    samples = x.numel() // norm.num_features
    _track(norm, mean, variance * ((samples - 1) / samples * (repeat * samples) / (repeat * samples - 1)))
    return y
