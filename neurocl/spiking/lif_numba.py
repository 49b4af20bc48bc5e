"""The LIF neuron on CPUs, alone or fused with BatchNorm: compiled kernels that read every tensor once.

A kernel walks over a block of neurons that fits the first-level cache, through all time steps, before it
goes to the next block, so membranes never reach main memory; the backward pass computes them again from the
input. Only the delayed reset lives here. Arithmetic is in float32 for float32 and bfloat16 tensors and in
float64 for float64, in the same order as the plain time loop, so results are the same to the last bit. The
work is cut in pieces that depend on the shape alone: the number of threads changes no digit.

Letters: T time steps, B batch, C channels, S positions in space, N neurons of one time step (B*C*S).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from neurocl.compat.numba_cache import ensure_numba_cache

ensure_numba_cache()

Array = NDArray[Any]

STATE_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.float32,
}

# Membranes of one block (48 KiB) stay near the first-level cache; smaller blocks cost more in calls than they gain.
SCRATCH_VALUES = 12288
SMALLEST_BLOCK = 64
LARGEST_BLOCK = 1024
# Rows a multiple of 4 KiB apart would share the same few cache sets and look like one another to the load unit.
PADDING = 80
# Below this many values per thread, waking a thread costs more than it saves.
VALUES_PER_THREAD = 1 << 15
# Partial sums of one BatchNorm: enough for the threads of a workstation, few enough to be cheap to add up.
MOST_CHUNKS = 32


@intrinsic  # type: ignore[untyped-decorator]
def _widen(typing_context, value):  # type: ignore[no-untyped-def]
    """The number a stored value stands for: uint16 holds the bits of a bfloat16, floats stand for themselves."""
    if not isinstance(value, types.Integer):
        return value(value), lambda context, builder, signature, args: args[0]

    def shift_up(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = context.get_value_type(types.uint32)
        bits = builder.shl(builder.zext(args[0], wide), wide(16))
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return types.float32(value), shift_up


@intrinsic  # type: ignore[untyped-decorator]
def _narrow(typing_context, value, array):  # type: ignore[no-untyped-def]
    """``value`` as ``array`` stores it: bfloat16 bits, rounded to nearest even, in a uint16 array."""
    if not isinstance(array.dtype, types.Integer):
        return value(value, array), lambda context, builder, signature, args: args[0]

    def round_down(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = context.get_value_type(types.uint32)
        short = context.get_value_type(types.uint16)
        bits = builder.bitcast(args[0], wide)
        odd = builder.and_(builder.lshr(bits, wide(16)), wide(1))
        rounded = builder.add(bits, builder.add(odd, wide(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        # Rounding up could turn a NaN's payload into an infinity.
        return builder.trunc(builder.lshr(builder.select(is_nan, wide(0x7FC00000), rounded), wide(16)), short)

    return types.uint16(value, array), round_down


@njit(nogil=True, error_model="numpy")
def _spread(values: Array, inner: int, start: int, out: Array) -> None:
    """Write each neuron's channel value to ``out``, neurons ``start`` onwards.

    A channel holds ``inner`` neighbouring neurons: S if channels come before space, 1 if they come last.
    """
    channels = len(values)
    j = 0
    channel = (start // inner) % channels
    left = inner - start % inner
    while j < len(out):
        run = min(left, len(out) - j)
        out[j : j + run] = values[channel]
        j += run
        left = inner
        channel += 1
        if channel == channels:
            channel = 0


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sum(values: Array) -> float:
    total = 0.0
    for j in range(len(values)):
        total += values[j]
    return total


@njit(nogil=True, error_model="numpy")
def _gather(values: Array, inner: int, start: int, out: Array) -> None:
    """Add each neuron's value to its channel in ``out``: the transpose of ``_spread``."""
    channels = len(out)
    j = 0
    channel = (start // inner) % channels
    left = inner - start % inner
    while j < len(values):
        run = min(left, len(values) - j)
        if run == 1:
            out[channel] += values[j]
        else:
            out[channel] += _sum(values[j : j + run])
        j += run
        left = inner
        channel += 1
        if channel == channels:
            channel = 0


# One loop, one function, and arrays only: the compiler turns such a loop into vector instructions, and gives up
# when there are more than about six arrays whose overlap it has to rule out.


@njit(nogil=True, error_model="numpy")
def _fire(x: Array, u: Array, out: Array, decay: Any, threshold: Any, zero: Any, one: Any) -> None:
    """One time step: membranes ``u`` and spikes ``out``."""
    for j in range(len(u)):
        m = u[j]
        reset = threshold if m > threshold else zero
        m = decay * m + _widen(x[j]) - reset
        u[j] = m
        out[j] = _narrow(one if m > threshold else zero, out)


@njit(nogil=True, error_model="numpy")
def _fire_on_sum(x: Array, extra: Array, u: Array, out: Array, decay: Any, threshold: Any, zero: Any, one: Any) -> None:
    """``_fire`` on x + extra, rounded as the sum would be if it were stored."""
    for j in range(len(u)):
        m = u[j]
        reset = threshold if m > threshold else zero
        m = decay * m + _widen(_narrow(_widen(x[j]) + _widen(extra[j]), x)) - reset
        u[j] = m
        out[j] = _narrow(one if m > threshold else zero, out)


@njit(nogil=True, error_model="numpy")
def _fire_on_scaled(
    x: Array, scale: Array, shift: Array, u: Array, out: Array, decay: Any, threshold: Any, zero: Any, one: Any
) -> None:
    """``_fire`` on x * scale + shift."""
    for j in range(len(u)):
        m = u[j]
        reset = threshold if m > threshold else zero
        m = decay * m + (_widen(x[j]) * scale[j] + shift[j]) - reset
        u[j] = m
        out[j] = _narrow(one if m > threshold else zero, out)


@njit(nogil=True, error_model="numpy")
def _load(x: Array, current: Array) -> None:
    for j in range(len(current)):
        current[j] = _widen(x[j])


@njit(nogil=True, error_model="numpy")
def _load_sum(x: Array, extra: Array, current: Array) -> None:
    for j in range(len(current)):
        current[j] = _widen(_narrow(_widen(x[j]) + _widen(extra[j]), x))


@njit(nogil=True, error_model="numpy")
def _load_scaled(x: Array, scale: Array, shift: Array, current: Array) -> None:
    for j in range(len(current)):
        current[j] = _widen(x[j]) * scale[j] + shift[j]


@njit(nogil=True, error_model="numpy")
def _charge(before: Array, now: Array, decay: Any, threshold: Any, zero: Any) -> None:
    """Turn the current in ``now`` into the membrane."""
    for j in range(len(now)):
        m = before[j]
        reset = threshold if m > threshold else zero
        now[j] = decay * m + now[j] - reset


@njit(nogil=True, error_model="numpy")
def _descend(
    now: Array, grad: Array, gu: Array, out: Array, decay: Any, threshold: Any, slope: Any, height: Any, one: Any
) -> None:
    """One time step backwards: the gradient of the membrane, kept in ``gu`` and written to ``out``."""
    for j in range(len(now)):
        q = slope * (now[j] - threshold)
        g = one / (one + q * q) * height * _widen(grad[j]) + decay * gu[j]
        gu[j] = g
        out[j] = _narrow(g, out)


@njit(nogil=True, error_model="numpy")
def _add(values: Array, total: Array) -> None:
    for j in range(len(total)):
        total[j] += _widen(values[j])


@njit(nogil=True, error_model="numpy")
def _store(values: Array, out: Array) -> None:
    for j in range(len(out)):
        out[j] = _narrow(values[j], out)


@njit(nogil=True, error_model="numpy")
def _accumulate(gu: Array, x: Array, centre: Array, total: Array, moment: Array) -> None:
    for j in range(len(gu)):
        total[j] += gu[j]
        moment[j] += gu[j] * (_widen(x[j]) - centre[j])


@njit(nogil=True, error_model="numpy")
def _accumulate_moments(x: Array, centre: Array, first: Array, second: Array) -> None:
    for j in range(len(x)):
        distance = np.float64(_widen(x[j])) - centre[j]
        first[j] += distance
        second[j] += distance * distance


@njit(nogil=True, error_model="numpy")
def _combine(x: Array, grad: Array, gain: Array, slope: Array, offset: Array, centre: Array, out: Array) -> None:
    for j in range(len(out)):
        out[j] = gain[j] * _widen(grad[j]) + slope[j] * (_widen(x[j]) - centre[j]) + offset[j]


@njit(cache=True, nogil=True, error_model="numpy")
def _forward(
    x: Array,
    x_step: int,
    extra: Any,
    extra_step: int,
    scales: Any,
    shifts: Any,
    inner: int,
    spikes: Array,
    steps: int,
    size: int,
    decay: Any,
    threshold: Any,
    scratch: Array,
    start: int,
    stop: int,
) -> None:
    """Spikes of neurons ``start`` to ``stop``; scratch [4, block]: membrane, current, scale, shift."""
    block = scratch.shape[1] - PADDING
    zero = scratch.dtype.type(0)
    one = scratch.dtype.type(1)
    for base in range(start, stop, block):
        n = min(block, stop - base)
        u = scratch[0, :n]
        scale = scratch[2, :n]
        shift = scratch[3, :n]
        if scales is not None and (inner > 1 or base == start):
            _spread(scales, inner, base, scale)
            _spread(shifts, inner, base, shift)
        u[:] = zero
        for t in range(steps):
            xt = x[t * x_step + base : t * x_step + base + n]
            out = spikes[t * size + base : t * size + base + n]
            if extra is None:
                if scales is None:
                    _fire(xt, u, out, decay, threshold, zero, one)
                else:
                    _fire_on_scaled(xt, scale, shift, u, out, decay, threshold, zero, one)
            else:
                et = extra[t * extra_step + base : t * extra_step + base + n]
                if scales is None:
                    _fire_on_sum(xt, et, u, out, decay, threshold, zero, one)
                else:
                    current = scratch[1, :n]
                    _load_scaled(xt, scale, shift, current)
                    _add(et, current)
                    _fire(current, u, out, decay, threshold, zero, one)


@njit(cache=True, nogil=True, error_model="numpy")
def _backward(
    x: Array,
    x_step: int,
    extra: Any,
    extra_step: int,
    scales: Any,
    shifts: Any,
    centres: Any,
    inner: int,
    grad: Array,
    grad_step: int,
    out: Array,
    out_step: int,
    steps: int,
    size: int,
    decay: Any,
    threshold: Any,
    slope: Any,
    total: Any,
    moment: Any,
    scratch: Array,
    sums: Any,
    start: int,
    stop: int,
) -> None:
    """Gradient of the input current of neurons ``start`` to ``stop``, summed over time if ``out_step`` is 0.

    With ``scales``: ``total`` [C] and ``moment`` [C] receive the sums of the gradient and of the gradient
    times the distance of ``x`` from ``centres``. scratch [4 + T, block]: gradient of the membrane, scale,
    shift, centre, membranes; sums [2, block], float64.
    """
    block = scratch.shape[1] - PADDING
    zero = scratch.dtype.type(0)
    one = scratch.dtype.type(1)
    height = scratch.dtype.type(slope / np.pi)
    for base in range(start, stop, block):
        n = min(block, stop - base)
        gu = scratch[0, :n]
        scale = scratch[1, :n]
        shift = scratch[2, :n]
        centre = scratch[3, :n]
        if scales is not None and (inner > 1 or base == start):
            _spread(scales, inner, base, scale)
            _spread(shifts, inner, base, shift)
            _spread(centres, inner, base, centre)
            sums[:] = 0.0
        gu[:] = zero
        for t in range(steps):
            # At the first step the gradient's row, still zero, stands for the membrane before it.
            before = gu if t == 0 else scratch[3 + t, :n]
            now = scratch[4 + t, :n]
            xt = x[t * x_step + base : t * x_step + base + n]
            if extra is None:
                if scales is None:
                    _load(xt, now)
                else:
                    _load_scaled(xt, scale, shift, now)
            else:
                et = extra[t * extra_step + base : t * extra_step + base + n]
                if scales is None:
                    _load_sum(xt, et, now)
                else:
                    _load_scaled(xt, scale, shift, now)
                    _add(et, now)
            _charge(before, now, decay, threshold, zero)
        # The membrane of the last step is needed once: its row turns into the sum over time.
        over_time = scratch[3 + steps, :n]
        for t in range(steps - 1, -1, -1):
            now = scratch[4 + t, :n]
            gt = grad[t * grad_step + base : t * grad_step + base + n]
            if out_step == 0:
                _descend(now, gt, gu, now, decay, threshold, slope, height, one)
                if t < steps - 1:
                    _add(now, over_time)
                if t == 0:
                    _store(over_time, out[base : base + n])
            else:
                target = out[t * out_step + base : t * out_step + base + n]
                _descend(now, gt, gu, target, decay, threshold, slope, height, one)
            if scales is not None:
                xt = x[t * x_step + base : t * x_step + base + n]
                _accumulate(gu, xt, centre, sums[0, :n], sums[1, :n])
        if scales is not None and (inner > 1 or base + block >= stop):
            # Channels repeat with every block if they come last; only then may one sum span many blocks.
            length = n if inner > 1 else min(block, stop - start)
            _gather(sums[0, :length], inner, base, total)
            _gather(sums[1, :length], inner, base, moment)


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sum_distance(x: Array, centre: float) -> tuple[float, float]:
    first = 0.0
    second = 0.0
    for j in range(len(x)):
        distance = np.float64(_widen(x[j])) - centre
        first += distance
        second += distance * distance
    return first, second


@njit(cache=True, nogil=True, error_model="numpy")
def _moments(
    x: Array, centres: Array, inner: int, total: Array, square: Array, scratch: Array, start: int, stop: int
) -> None:
    """Add to ``total`` [C] and ``square`` [C] the distances from ``centres`` and their squares."""
    channels = len(total)
    if inner > 1:
        base = start
        while base < stop:
            channel = (base // inner) % channels
            run = min(inner - base % inner, stop - base)
            first, second = _sum_distance(x[base : base + run], centres[channel])
            total[channel] += first
            square[channel] += second
            base += run
        return
    block = scratch.shape[1] - PADDING
    scratch[1:] = 0.0
    for base in range(start, stop, block):
        n = min(block, stop - base)
        if base == start:
            _spread(centres, inner, base, scratch[0, :n])
        _accumulate_moments(x[base : base + n], scratch[0, :n], scratch[1, :n], scratch[2, :n])
    length = min(block, stop - start)
    _gather(scratch[1, :length], inner, start, total)
    _gather(scratch[2, :length], inner, start, square)


@njit(cache=True, nogil=True, error_model="numpy")
def _input_gradient(
    x: Array,
    grad: Array,
    out: Array,
    gains: Array,
    slopes: Array,
    offsets: Array,
    centres: Array,
    inner: int,
    scratch: Array,
    start: int,
    stop: int,
) -> None:
    """out = gain * grad + slope * (x - centre) + offset, channel by channel; ``out`` may be ``grad``."""
    block = scratch.shape[1] - PADDING
    for base in range(start, stop, block):
        n = min(block, stop - base)
        if inner > 1 or base == start:
            _spread(gains, inner, base, scratch[0, :n])
            _spread(slopes, inner, base, scratch[1, :n])
            _spread(offsets, inner, base, scratch[2, :n])
            _spread(centres, inner, base, scratch[3, :n])
        result = scratch[4, :n]
        _combine(
            x[base : base + n],
            grad[base : base + n],
            scratch[0, :n],
            scratch[1, :n],
            scratch[2, :n],
            scratch[3, :n],
            result,
        )
        # Storing comes last because ``out`` and ``grad`` may be the same memory.
        _store(result, out[base : base + n])


_pools: dict[int, ThreadPoolExecutor] = {}
# Threads do not survive a fork: a child process starts its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def _share(pieces: int, values: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(first, last)`` on ranges that cover ``pieces``, on as many threads as torch uses."""
    count = max(1, min(torch.get_num_threads(), pieces, values // VALUES_PER_THREAD))
    if count == 1:
        work(0, pieces)
        return
    if count not in _pools:
        _pools[count] = ThreadPoolExecutor(count - 1, thread_name_prefix="neurocl-lif")
    bounds = [pieces * k // count for k in range(count + 1)]
    futures = [_pools[count].submit(work, bounds[k], bounds[k + 1]) for k in range(1, count)]
    work(bounds[0], bounds[1])
    for future in futures:
        future.result()


def _flat(tensor: Tensor, length: int) -> Array:
    """The ``length`` values from the tensor's first one on, as they lie in memory, bfloat16 as uint16."""
    memory = tensor.detach().as_strided((length,), (1,))
    return (memory.view(torch.uint16) if tensor.dtype == torch.bfloat16 else memory).numpy()


def _is_dense(step: Tensor) -> bool:
    """Whether the values fill one piece of memory without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(step.stride(), step.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _dense_steps(x: Tensor) -> Tensor:
    """``x`` [T, ...] itself if each of its steps is dense, else a copy; repeated steps stay repeated."""
    if x.stride(0) >= 0 and _is_dense(x[0]):
        return x
    return x[:1].contiguous().expand_as(x) if x.stride(0) == 0 else x.contiguous()


def _in_order_of(x: Tensor, model: Tensor) -> Tensor:
    """``x`` itself if its steps lie in memory like those of ``model``, else a copy that does."""
    same = all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(x.shape[1:], x.stride()[1:], model.stride()[1:], strict=True)
    )
    if same and x.dtype == model.dtype:
        return x
    return _empty_like(model).copy_(x)


def _empty_like(model: Tensor) -> Tensor:
    """A new tensor whose steps lie in memory like those of ``model``, one after the other."""
    return torch.empty_strided(model.shape, (model[0].numel(), *model.stride()[1:]), dtype=model.dtype)


@dataclass(frozen=True)
class _Steps:
    """A [T, ...] tensor as the kernels see it: flat memory and the distance of two steps."""

    memory: Array
    step: int

    @classmethod
    def of(cls, x: Tensor) -> _Steps:
        steps, size = x.shape[0], x[0].numel()
        stride = x.stride(0) if steps > 1 else size
        return cls(_flat(x, (steps - 1) * stride + size), stride)


def _block(rows: int, unit: int = 1) -> int:
    """Neurons of one block: ``rows`` scratch values each, and a multiple of ``unit``."""
    fitting = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, SCRATCH_VALUES // rows // 64 * 64))
    return max(1, fitting // unit) * unit


def _scratch(rows: int, block: int, dtype: Any) -> Array:
    """Working memory, aligned to cache lines as torch's memory is and numpy's is not."""
    size = rows * (block + PADDING) * np.dtype(dtype).itemsize
    memory: Array = torch.empty(size, dtype=torch.uint8).numpy().view(dtype)
    return memory.reshape(rows, block + PADDING)


def supports(x: Tensor) -> bool:
    """Whether the kernels take tensors of this device and dtype."""
    return x.device.type == "cpu" and x.dtype in STATE_DTYPES


def lif_forward(x: Tensor, extra: Tensor | None, decay: float, threshold: float) -> Tensor:
    """Spikes of the current ``x`` (plus ``extra``), both [T, ...]; the result lies in memory like ``x``."""
    x = _dense_steps(x)
    spikes = _empty_like(x)
    steps, size = x.shape[0], x[0].numel()
    if size == 0:
        return spikes
    state = STATE_DTYPES[x.dtype]
    source, target = _Steps.of(x), _Steps.of(spikes)
    other = None if extra is None else _Steps.of(_in_order_of(extra, x))
    block = _block(4)

    def work(first: int, last: int) -> None:
        _forward(
            source.memory,
            source.step,
            None if other is None else other.memory,
            0 if other is None else other.step,
            None,
            None,
            1,
            target.memory,
            steps,
            size,
            state(decay),
            state(threshold),
            _scratch(4, block, state),
            first * block,
            min(last * block, size),
        )

    _share(-(-size // block), steps * size, work)
    return spikes


def lif_backward(grad: Tensor, x: Tensor, extra: Tensor | None, decay: float, threshold: float, slope: float) -> Tensor:
    """Gradient of the current [T, ...] from that of the spikes; ``slope`` is pi/2 * alpha."""
    x = _dense_steps(x)
    result = _empty_like(x)
    steps, size = x.shape[0], x[0].numel()
    if size == 0:
        return result
    state = STATE_DTYPES[x.dtype]
    source, incoming, target = _Steps.of(x), _Steps.of(_in_order_of(grad, x)), _Steps.of(result)
    other = None if extra is None else _Steps.of(_in_order_of(extra, x))
    block = _block(4 + steps)

    def work(first: int, last: int) -> None:
        _backward(
            source.memory,
            source.step,
            None if other is None else other.memory,
            0 if other is None else other.step,
            None,
            None,
            None,
            1,
            incoming.memory,
            incoming.step,
            target.memory,
            size,
            steps,
            size,
            state(decay),
            state(threshold),
            state(slope),
            None,
            None,
            _scratch(4 + steps, block, state),
            None,
            first * block,
            min(last * block, size),
        )

    _share(-(-size // block), steps * size, work)
    return result


@dataclass(frozen=True)
class Channels:
    """Where the channels of a dense [M, C, ...] tensor lie in memory.

    Attributes:
        count: C.
        inner: neighbouring values of one channel: S if channels come before space, 1 if they come last.
    """

    count: int
    inner: int

    @property
    def unit(self) -> int:
        """Blocks and chunks hold a multiple of this many values."""
        return self.count if self.inner == 1 else 1

    def chunk(self, size: int) -> int:
        """Values in one chunk out of ``size``; every chunk has its own partial sums."""
        wanted = max(VALUES_PER_THREAD, -(-size // MOST_CHUNKS))
        return -(-wanted // self.unit) * self.unit


def channels_of(x: Tensor) -> Channels | None:
    """The layout of ``x`` [M, C, ...] if it is dense with channels second or last in memory, else None."""
    if x.is_contiguous():
        return Channels(x.shape[1], x[0, 0].numel())
    return Channels(x.shape[1], 1) if x.movedim(1, -1).is_contiguous() else None


def channel_statistics(x: Tensor, channels: Channels) -> tuple[Array, Array]:
    """Mean and (biased) variance of every channel of ``x`` [M, C, ...]; two float64 arrays [C]."""
    memory = _flat(x, x.numel())
    # Distances from a value of the channel itself keep digits that x squared would lose.
    centres = x.detach()[0].reshape(channels.count, -1)[:, 0].double().numpy()
    chunk = channels.chunk(x.numel())
    count = -(-x.numel() // chunk)
    block = _block(6, channels.unit)
    partial = np.zeros((2, count, channels.count))

    def work(first: int, last: int) -> None:
        scratch = _scratch(3, block, np.float64)
        for k in range(first, last):
            start, stop = k * chunk, min((k + 1) * chunk, len(memory))
            _moments(memory, centres, channels.inner, partial[0, k], partial[1, k], scratch, start, stop)

    _share(count, x.numel(), work)
    total, square = partial.sum(axis=1)
    samples = x.numel() // channels.count
    offset = total / samples
    variance: Array = np.maximum(square / samples - offset * offset, 0.0)
    return centres + offset, variance


@dataclass(frozen=True)
class Affine:
    """A normalisation as the kernels apply it, float64 arrays [C]: z = (x - mean) * invstd * weight + bias."""

    mean: Array
    invstd: Array
    weight: Array
    bias: Array

    @property
    def scale(self) -> Array:
        return self.weight * self.invstd

    @property
    def shift(self) -> Array:
        offset: Array = self.bias - self.mean * self.scale
        return offset


def norm_lif_forward(
    x: Tensor,
    extra: Tensor | None,
    channels: Channels,
    affine: Affine,
    *,
    steps: int,
    repeat: bool,
    decay: float,
    threshold: float,
) -> Tensor:
    """Spikes [T*B, C, ...] of the normalised ``x`` (plus ``extra``).

    ``x`` is [T*B, C, ...], or [B, C, ...] if ``repeat``: the same current at every step.
    """
    size = x.numel() if repeat else x.numel() // steps
    spikes = torch.empty_strided((steps * size // x[0].numel(), *x.shape[1:]), x.stride(), dtype=x.dtype)
    state = STATE_DTYPES[x.dtype]
    source, target = _flat(x, x.numel()), _flat(spikes, steps * size)
    other = None if extra is None else _flat(_in_order_of(extra, spikes), steps * size)
    scales, shifts = affine.scale.astype(state), affine.shift.astype(state)
    block = _block(4, channels.unit)

    def work(first: int, last: int) -> None:
        _forward(
            source,
            0 if repeat else size,
            other,
            size,
            scales,
            shifts,
            channels.inner,
            target,
            steps,
            size,
            state(decay),
            state(threshold),
            _scratch(4, block, state),
            first * block,
            min(last * block, size),
        )

    _share(-(-size // block), steps * size, work)
    return spikes


def norm_lif_backward(
    grad: Tensor,
    x: Tensor,
    extra: Tensor | None,
    channels: Channels,
    affine: Affine,
    *,
    steps: int,
    repeat: bool,
    decay: float,
    threshold: float,
    slope: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor | None, Array, Array]:
    """Gradients of ``x``, of ``extra`` (None without one), of the weight [C] and of the bias [C].

    Raises:
        ValueError: both ``repeat`` and ``extra``: their gradients have different shapes.
    """
    if repeat and extra is not None:
        raise ValueError("a repeated current takes no shortcut")
    size = x.numel() if repeat else x.numel() // steps
    state = STATE_DTYPES[x.dtype]
    total_size = x.numel()
    current = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    spike_model = current if not repeat else grad.new_empty((0,))
    if repeat:
        spike_model = torch.empty_strided((steps * x.shape[0], *x.shape[1:]), x.stride(), dtype=x.dtype)
    source, target = _flat(x, total_size), _flat(current, total_size)
    incoming = _flat(_in_order_of(grad, spike_model), steps * size)
    other = None if extra is None else _flat(_in_order_of(extra, x), steps * size)
    scales, shifts = affine.scale.astype(state), affine.shift.astype(state)
    centres = affine.mean.astype(state)
    chunk = channels.chunk(size)
    count = -(-size // chunk)
    block = _block(4 + steps + 4, channels.unit)
    partial = np.zeros((2, count, channels.count))

    def sum_up(first: int, last: int) -> None:
        scratch, sums = _scratch(4 + steps, block, state), _scratch(2, block, np.float64)
        for k in range(first, last):
            _backward(
                source,
                0 if repeat else size,
                other,
                size,
                scales,
                shifts,
                centres,
                channels.inner,
                incoming,
                size,
                target,
                0 if repeat else size,
                steps,
                size,
                state(decay),
                state(threshold),
                state(slope),
                partial[0, k],
                partial[1, k],
                scratch,
                sums,
                k * chunk,
                min((k + 1) * chunk, size),
            )

    _share(count, steps * size, sum_up)
    total, moment = partial.sum(axis=1)
    samples = steps * size // channels.count
    copies = steps if repeat else 1
    gains = affine.scale
    slopes = offsets = np.zeros(channels.count)
    if batch_statistics:
        slopes = -gains * affine.invstd**2 * moment * (copies / samples)
        offsets = -gains * total * (copies / samples)
    result = current if extra is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    destination = _flat(result, total_size)
    vectors = [values.astype(state) for values in (gains, slopes, offsets, centres)]
    block = _block(6, channels.unit)

    def finish(first: int, last: int) -> None:
        _input_gradient(
            source,
            target,
            destination,
            *vectors,
            channels.inner,
            _scratch(5, block, state),
            first * block,
            min(last * block, total_size),
        )

    _share(-(-total_size // block), total_size, finish)
    return result, None if extra is None else current, affine.invstd * moment, total
