"""One STAER training step against a straightforward one: snntorch neurons in a loop over time, six forward passes.

Both sides train the same network with the same weights on the same batches; before anything is timed their losses
must agree to 1e-5 in float64, where no spike hangs on rounding (in float32 the order of a sum can flip a spike whose
membrane lies at the threshold; that difference is printed). Times are medians of interleaved steps in one process;
peak memory is measured in a process of its own per side, above what the process held before its first step.

    python benchmarks/staer_step.py --threads 1 --batch 32 --timesteps 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import snntorch
import torch
import torch.nn.functional as F
from snntorch import surrogate
from torch import Tensor, nn

from neurocl.continual.config import OptimizerConfig
from neurocl.continual.method import Batch, Setting
from neurocl.continual.optimizer import build_optimizer
from neurocl.data.augment import Augment
from neurocl.spiking.network import SpikingClassifier, spiking_resnet_small
from neurocl.spiking.staer import Staer, StaerConfig

CLASSES = 10
CONVOLUTIONS = ("mkldnn_convolution", "cudnn_convolution", "convolution_backward")
SIDES = {
    "straightforward": {},
    "neurocl exact": {},
    "neurocl fast options": {"storage_passes": "single", "half_forward": "slice"},
    "neurocl fast options, bf16": {"storage_passes": "single", "half_forward": "slice"},
}


class PeerLif(nn.Module):
    """snntorch's neuron, one call per time step."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = snntorch.Leaky(beta=0.5, threshold=1.0, spike_grad=surrogate.atan())

    def forward(self, x: Tensor) -> Tensor:
        membrane = self.neuron.init_leaky()
        spikes = []
        for current in x:
            spike, membrane = self.neuron(current, membrane)
            spikes.append(spike.to(x.dtype))
        return torch.stack(spikes)


class PeerLayer(nn.Module):
    """Convolution and BatchNorm over [T*B, ...]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.flatten(0, 1))).unflatten(0, (x.shape[0], -1))


class PeerBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.lif1 = PeerLayer(inputs, outputs, 3, stride), PeerLif()
        self.second, self.lif2, self.lif3 = PeerLayer(outputs, outputs, 3, 1), PeerLif(), PeerLif()
        self.shortcut = PeerLayer(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.lif2(self.second(self.lif1(self.first(x))))
        return self.lif3(h + (x if self.shortcut is None else self.shortcut(x)))


class PeerNetwork(nn.Module):
    """The layout of spiking-resnet-small, written the plain way."""

    def __init__(self, in_channels: int, stem: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.lif = PeerLayer(in_channels, stem, 3, 1), PeerLif()
        widths = [stem, *channels]
        self.blocks = nn.Sequential(*(PeerBlock(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairwise(widths))))
        self.head = nn.Linear(widths[-1], CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.lif(self.stem(x))).mean(dim=(3, 4)))


def peer_divergence(x: Tensor, y: Tensor) -> Tensor:
    """tslearn's soft-DTW divergence on half squared distances, divided by the mean length, batch mean."""
    from tslearn.metrics import SoftDTWLossPyTorch

    def half_squared(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(dim=3)

    loss = SoftDTWLossPyTorch(gamma=1.0, normalize=True, dist_func=half_squared)
    return (loss(x, y) / ((x.shape[1] + y.shape[1]) / 2)).mean()


class Data:
    """Batches of one step: current, replayed with labels, replayed with series."""

    def __init__(self, batch: int, timesteps: int, size: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def images() -> Tensor:
            return torch.randint(256, (batch, 3, size, size), generator=generator, dtype=torch.uint8).to(device)

        def labels() -> Tensor:
            return torch.randint(CLASSES, (batch,), generator=generator).to(device)

        def series(steps: int) -> Tensor:
            return torch.randn(batch, steps, CLASSES, generator=generator).to(device, dtype)

        self.raw, self.y = images(), labels()
        self.replay_raw, self.replay_y = images(), labels()
        self.series_raw = images()
        self.past = {"half": series(timesteps // 2), "same": series(timesteps), "double": series(2 * timesteps)}


Step = Callable[[], float]
Shape = tuple[int, int, int]  # batch, time steps, height and width


def peer_step(data: Data, timesteps: int, weights: dict[str, Tensor]) -> Step:
    """A step as one would write it from the paper."""
    network = PeerNetwork(3, 64, (64, 128))
    network.load_state_dict(weights)
    network.to(data.y.device, data.past["same"].dtype)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    batch = len(data.y)

    def encode(raw: Tensor) -> Tensor:
        return (raw.to(network.head.weight.dtype) / 255).unsqueeze(0).repeat(timesteps, 1, 1, 1, 1)

    def step() -> float:
        optimizer.zero_grad()
        x, replay, aligned = encode(data.raw), encode(data.replay_raw), encode(data.series_raw)
        z = network(torch.cat([x, replay], dim=1))
        network(x[: timesteps // 2]), network(x), network(torch.cat([x, x]))
        series, half = network(aligned), network(aligned[:, : batch // 2])
        alignment = peer_divergence(series.transpose(0, 1), data.past["same"])
        alignment = alignment + 0.5 * peer_divergence(half.transpose(0, 1), data.past["half"][: batch // 2])
        alignment = alignment + 0.5 * peer_divergence(half.transpose(0, 1), data.past["double"][: batch // 2])
        loss = F.cross_entropy(z.mean(dim=0), torch.cat([data.y, data.replay_y])) + 1e-4 * alignment / 2
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


class FixedDraw:
    """Stands in for the memory during timing, so that both sides replay the same items."""

    def __init__(self, draws: list[dict[str, Tensor]]) -> None:
        self.draws, self.turn = draws, 0

    def __len__(self) -> int:
        return 1

    def sample(self, count: int) -> dict[str, Tensor]:
        self.turn += 1
        return self.draws[self.turn % 2 - 1]


def our_step(data: Data, timesteps: int, network: SpikingClassifier, options: dict[str, str], bf16: bool) -> Step:
    """The step of ``neurocl spiking train``."""
    optimizer_config = OptimizerConfig(name="adamw", lr=3e-3)
    setting = Setting(
        task_sizes=(2,) * 5,
        input_shape=tuple(data.raw.shape[1:]),
        augment=Augment("none", None, None),
        buffer_size=len(data.y),
        batch_size=len(data.y),
        replay_batch=len(data.y),
        epochs=1,
        per_step_loss=False,
        make_optimizer=lambda parameters: build_optimizer(optimizer_config, parameters),
        augment_generator=torch.Generator(),
        seed=0,
    )
    method = Staer(network, setting, StaerConfig(**options)).train()
    optimizer = setting.make_optimizer(network.parameters())
    del method._modules["memory"]
    method.memory = FixedDraw(  # type: ignore[assignment]
        [{"image": data.replay_raw, "label": data.replay_y}, {"image": data.series_raw, **data.past}]
    )
    dtype = data.past["same"].dtype
    network.to(data.y.device, dtype)
    augment = setting.augment.normalise
    method.augmented = lambda raw: augment(raw).to(dtype)  # type: ignore[method-assign]
    batch = Batch(data.raw.to(dtype) / 255, data.y, data.raw, torch.arange(len(data.y), device=data.y.device))

    def step() -> float:
        with torch.autocast(data.y.device.type, torch.bfloat16, enabled=bf16):
            terms = method.loss(batch)
        loss = torch.stack([term.to(dtype) for term in terms.values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def make_step(side: str, shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Step:
    """A step of one of ``SIDES``, all from the same weights and data."""
    torch.manual_seed(0)
    batch, timesteps, size = shape
    network = spiking_resnet_small((3, size, size), CLASSES, timesteps=timesteps)
    data = Data(batch, timesteps, size, dtype, device)
    if side == "straightforward":
        return peer_step(data, timesteps, peer_order(network))
    return our_step(data, timesteps, network, SIDES[side], side.endswith("bf16"))


def peer_order(network: SpikingClassifier) -> dict[str, Tensor]:
    """Our weights in the order of the peer's state dict (its layers hold conv, norm; its neurons nothing learnt)."""
    ours = network.network.state_dict()
    peer = PeerNetwork(3, 64, (64, 128)).state_dict()
    names = {"stem.conv": "stem", "stem.norm": "stem_lif.norm", "head": "head"}
    for index in range(2):
        block = f"stages.{index}.0"
        names |= {
            f"blocks.{index}.first.conv": f"{block}.conv1",
            f"blocks.{index}.first.norm": f"{block}.lif1.norm",
            f"blocks.{index}.second.conv": f"{block}.conv2",
            f"blocks.{index}.second.norm": f"{block}.lif2.norm",
            f"blocks.{index}.shortcut.conv": f"{block}.shortcut.0",
            f"blocks.{index}.shortcut.norm": f"{block}.shortcut.1",
        }
    ordered = {}
    for name, value in peer.items():
        prefix, _, last = name.rpartition(".")
        ordered[name] = ours[f"{names[prefix]}.{last}"].clone() if prefix in names else value
    return ordered


def timings(shape: Shape, device: str, repeats: int) -> dict[str, float]:
    """Median seconds of every side, interleaved; checks the first losses."""
    exact = ("straightforward", "neurocl exact")
    peer, ours = (make_step(side, shape, device, torch.float64)() for side in exact)
    if abs(peer - ours) > 1e-5:
        raise SystemExit(f"the losses of the two sides differ in float64: {peer} and {ours}")
    print(f"first losses in float64: {peer:.9f} and {ours:.9f}, difference {abs(peer - ours):.1e}")
    steps = {side: make_step(side, shape, device) for side in SIDES}
    first = {side: step() for side, step in steps.items()}
    print(f"first losses in float32: {', '.join(f'{side} {value:.6f}' for side, value in first.items())}")
    measured: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, step in steps.items():
            began = time.perf_counter()
            step()
            measured[side].append(time.perf_counter() - began)
    return {side: statistics.median(values) for side, values in measured.items()}


def resident_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in MB, as Linux reports it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"this system does not report {field}; memory is measured on Linux only")


def peak_memory(side: str, shape: Shape, device: str) -> float:
    """Peak memory in MB of two steps above what was there before them (call in a fresh process).

    Resident memory on a CPU, memory that torch allocated on a CUDA device.
    """
    make_step(side, (2, shape[1], 8), device)()
    step = make_step(side, shape, device)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident_mb("VmRSS")
    step()
    step()
    return resident_mb("VmHWM") - before


def convolution_share(side: str, shape: Shape, device: str) -> float:
    """Share of a step's time that its device spends inside convolutions, forward and backward."""
    step = make_step(side, shape, device)
    step()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 if device == "cpu" else 2]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    field = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    times = {event.key: getattr(event, field) for event in profile.key_averages()}
    inside = sum(time for key, time in times.items() if any(name in key for name in CONVOLUTIONS))
    return inside / max(sum(times.values()), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="height and width of the pictures")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a small batch, three repeats")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.repeats, options.size = 8, 3, 16
    torch.set_num_threads(options.threads)
    shape = (options.batch, options.timesteps, options.size)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, shape, options.device)))
        return
    print(
        f"STAER step, spiking-resnet-small, B={shape[0]} T={shape[1]} 3x{shape[2]}x{shape[2]}, "
        f"{options.device}, {options.threads} thread(s)"
    )
    seconds = timings(shape, options.device, options.repeats)
    print(f"{'side':28}{'ms':>9}{'times faster':>14}{'peak MB':>10}{'of peer':>9}{'in convolutions':>17}")
    base_memory = None
    for side in SIDES:
        command = [sys.executable, __file__, "--memory-of", side, "--threads", str(options.threads)]
        command += ["--batch", str(shape[0]), "--timesteps", str(shape[1]), "--size", str(shape[2])]
        command += ["--device", options.device]
        memory = float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        base_memory = base_memory or memory
        ratio = seconds["straightforward"] / seconds[side]
        share = convolution_share(side, shape, options.device)
        print(
            f"{side:28}{1e3 * seconds[side]:9.0f}{ratio:14.2f}{memory:10.0f}{memory / base_memory:9.2f}{share:17.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
