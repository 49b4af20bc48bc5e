"""The LIF layer against other libraries: time of forward + backward and memory kept in between, in one process.

    python benchmarks/lif.py --threads 1
    python benchmarks/lif.py --quick                # a smaller layer, seconds

Contenders take turns in every repeat and the medians are compared, so that whatever else the machine does
weighs on all of them. Large tensors are returned to the system and mapped again at every step unless glibc
is told not to; to leave those page faults out, run with

    MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_MMAP_THRESHOLD_=100000000000 python benchmarks/lif.py

Letters: T time steps, B batch, C channels.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neurocl.spiking.neuron import lif, norm_lif

STEPS = 4


@dataclass
class Contender:
    """One way to compute the spikes, with what was measured of it."""

    name: str
    forward: Callable[[Tensor], Tensor]
    seconds: list[float] = field(default_factory=list)
    kept_bytes: int = 0
    new_bytes: int = 0

    def step(self, x: Tensor, grad: Tensor) -> None:
        x.grad = None
        start = time.perf_counter()
        self.forward(x).backward(grad)
        self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Held:
    """A tensor that the backward pass holds; gone when the pass lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """Bytes that ``forward`` keeps for its backward pass: in all, and without ``x`` itself."""
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        held.add(item := Held(tensor))
        return item

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item.tensor):
        result = forward(x)
    storages = [item.tensor.untyped_storage() for item in held]
    pieces = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del result
    total = sum(pieces.values())
    return total, total - pieces.get(x.untyped_storage().data_ptr(), 0)


def spikingjelly_layer() -> Callable[[Tensor], Tensor]:
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(
        tau=2.0,
        decay_input=False,
        v_reset=None,
        detach_reset=True,
        surrogate_function=surrogate.ATan(alpha=2.0),
        step_mode="m",
    )

    def forward(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return forward


def snntorch_layer() -> Callable[[Tensor], Tensor]:
    import snntorch
    from snntorch import surrogate

    node = snntorch.Leaky(beta=0.5, threshold=1.0, spike_grad=surrogate.atan())

    def forward(x: Tensor) -> Tensor:
        membrane = node.reset_mem()
        spikes = []
        for current in x:
            fired, membrane = node(current, membrane)
            spikes.append(fired)
        return torch.stack(spikes)

    return forward


def norse_layer() -> Callable[[Tensor], Tensor]:
    import norse.torch as norse

    # A step of 1/500 at tau_mem_inv 250 halves the membrane; the input enters halved, the reset is to zero.
    parameters = norse.LIFBoxParameters(tau_mem_inv=torch.tensor(250.0), v_th=torch.tensor(1.0))
    cell = norse.LIFBoxCell(parameters, dt=0.002)

    def forward(x: Tensor) -> Tensor:
        state = None
        spikes = []
        for current in x:
            fired, state = cell(current, state)
            spikes.append(fired)
        return torch.stack(spikes)

    return forward


def neuron_contenders() -> list[Contender]:
    contenders = [
        Contender("neurocl lif", lif),
        Contender("neurocl lif, torch loop", lambda x: lif(x, backend="torch")),
        Contender("spikingjelly LIFNode multi-step", spikingjelly_layer()),
        Contender("snntorch Leaky loop", snntorch_layer()),
    ]
    if importlib.util.find_spec("norse") is not None:
        contenders.append(Contender("norse LIFBoxCell loop", norse_layer()))
    return contenders


def norm_contenders(channels: int) -> list[Contender]:
    norm = nn.BatchNorm2d(channels)

    def separate(x: Tensor) -> Tensor:
        return lif(norm(x).unflatten(0, (STEPS, -1))).flatten(0, 1)

    return [
        Contender("neurocl norm_lif", lambda x: norm_lif(x, norm, timesteps=STEPS)),
        Contender("BatchNorm2d, neurocl lif", separate),
    ]


def block_contenders(channels: int) -> list[Contender]:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    norm = nn.BatchNorm2d(channels)

    def with_neuron(neuron: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: neuron(norm(conv(x)).unflatten(0, (STEPS, -1))).flatten(0, 1)

    return [
        Contender("conv, norm_lif", lambda x: norm_lif(conv(x), norm, timesteps=STEPS)),
        Contender("conv, BatchNorm2d, neurocl lif", with_neuron(lif)),
        Contender("conv, BatchNorm2d, spikingjelly", with_neuron(spikingjelly_layer())),
        Contender("conv, BatchNorm2d, snntorch", with_neuron(snntorch_layer())),
        Contender("convolution alone", conv),
    ]


def compare(title: str, contenders: list[Contender], x: Tensor, repeats: int) -> None:
    print(f"\n{title}, {repeats} repeats")
    print(f"  {'':32} {'ms':>8} {'ratio':>6} {'kept MB':>8} {'ratio':>6} {'without the input':>18}")
    grad = torch.randn_like(x)
    x = x.detach().requires_grad_()
    for contender in contenders:
        contender.kept_bytes, contender.new_bytes = kept_bytes(contender.forward, x)
        contender.step(x, grad)
        contender.seconds.clear()
    for _ in range(repeats):
        for contender in contenders:
            contender.step(x, grad)
    first = contenders[0]
    for contender in contenders:
        print(
            f"  {contender.name:32} {1e3 * contender.median:8.1f} {contender.median / first.median:6.2f} "
            f"{contender.kept_bytes / 1e6:8.1f} {contender.kept_bytes / first.kept_bytes:6.2f} "
            f"{contender.new_bytes / 1e6:18.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the kernels")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of every contender")
    parser.add_argument("--quick", action="store_true", help="B=8 instead of 64")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch = 8 if options.quick else 64
    channels, side = 128, 32
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, malloc {malloc or 'default'}")
    size = f"T={STEPS}, {batch}x{channels}x{side}x{side}"
    x = 1.5 * torch.randn(STEPS, batch, channels, side, side)
    compare(f"LIF, {size}, float32", neuron_contenders(), x, options.repeats)
    images = x.flatten(0, 1)
    compare(f"BatchNorm + LIF, {size}, channels first", norm_contenders(channels), images, options.repeats)
    images = images.contiguous(memory_format=torch.channels_last)
    compare(f"BatchNorm + LIF, {size}, channels last", norm_contenders(channels), images, options.repeats)
    del x
    # The convolution takes most of the time: a quarter of the batch shows the same ratios.
    small = images[: STEPS * batch // 4].contiguous(memory_format=torch.channels_last)
    del images
    size = f"T={STEPS}, {batch // 4}x{channels}x{side}x{side}"
    compare(f"conv 3x3 + BatchNorm + LIF, {size}, channels last", block_contenders(channels), small, 3)


if __name__ == "__main__":
    main()
