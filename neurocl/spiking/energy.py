"""What one image costs a spiking network: firing rates, operations, energy beside the ANN twin, measured time.

Operations are counted in a real forward pass, per image. A convolution or linear layer that reads spikes adds one
weight per spike and output that the spike reaches (a synaptic operation, AC), exactly, borders and strides included.
One that reads real numbers multiplies and adds (MAC), borders counted as if full, as is usual. A neuron multiplies
its membrane by the decay and adds its input once a step (an update, priced as a MAC); spikes that pass a shortcut
without weights are added to a membrane one by one (AC). BatchNorm is folded into the weights in front and costs
nothing. Comparisons, resets, activation functions and pooling are counted neither here nor for the twin.

The ANN twin is the same layers, each applied once to real numbers of the same width. Memory traffic is at batch 1
and kept apart from computing: weights are read at every application of a layer, inputs read and outputs written,
4 bytes a number and 1 bit a spike, membranes read and written at every step.

Letters: T time steps, B batch, C channels. All energies are theoretical but for :class:`Timing`.

Reference: Horowitz, "Computing's energy problem", ISSCC 2014 (45 nm, 32-bit float: multiply 3.7 pJ, add 0.9 pJ).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurocl.continual.training import LoadedRun, load_run
from neurocl.energy_meter import EnergyMeter, EnergyReading
from neurocl.errors import UserError
from neurocl.spiking.network import Lif, NormLif, SpikingClassifier

NUMBER_BYTES = 4
SPIKE_BYTES = 1 / 8
TIMED_SECONDS = 0.2
BATCH_1_ITEMS = 8


@dataclass(frozen=True)
class Constants:
    """Prices of operations in picojoule."""

    mac_pj: float
    ac_pj: float
    byte_pj: float
    source: str = "theoretical, 45 nm constants (Horowitz 2014), 32-bit float; memory at 3.12 pJ per bit (as in STEP)"


@dataclass(frozen=True)
class LayerEnergy:
    """One layer, per image and summed over time.

    Attributes:
        name: its path in the network.
        kind: ``"conv"``, ``"linear"``, ``"norm-lif"`` (BatchNorm and neurons) or ``"lif"``.
        macs, acs: multiply-adds and additions.
        macs_every_step: MACs if nothing were reused; more than ``macs`` in a first layer that reads a static image.
        updates: membrane updates, T for every neuron.
        neurons: number of neurons, 0 for conv and linear.
        spikes: spikes that the layer emits.
        firing_rate: spikes per neuron and step, None for conv and linear.
        dead_share: share of neurons that fired for none of the items measured, None for conv and linear.
        compute_pj: energy of the operations.
        memory_bytes: traffic.
        memory_bytes_every_step: traffic if nothing were reused.
        ann_macs, ann_acs, ann_pj, ann_memory_bytes: of the twin's layer.
    """

    name: str
    kind: str
    macs: float = 0.0
    acs: float = 0.0
    macs_every_step: float = 0.0
    updates: float = 0.0
    neurons: int = 0
    spikes: float = 0.0
    firing_rate: float | None = None
    dead_share: float | None = None
    compute_pj: float = 0.0
    memory_bytes: float = 0.0
    memory_bytes_every_step: float = 0.0
    ann_macs: float = 0.0
    ann_acs: float = 0.0
    ann_pj: float = 0.0
    ann_memory_bytes: float = 0.0


@dataclass(frozen=True)
class Totals:
    """One network, per image.

    Attributes:
        macs, acs, updates: operations.
        synapse_pj: energy of MACs and ACs.
        neuron_pj: energy of the membrane updates.
        compute_pj: both.
        memory_bytes, memory_pj: traffic at batch 1, not part of ``compute_pj``.
    """

    macs: float
    acs: float
    updates: float
    synapse_pj: float
    neuron_pj: float
    compute_pj: float
    memory_bytes: float
    memory_pj: float


@dataclass(frozen=True)
class Timing:
    """Measured cost of inference on this machine, after a warm-up.

    Attributes:
        batch_size: images per forward pass.
        images: images in the measurement.
        seconds_per_image, cpu_seconds_per_image: wall time, and CPU time of all threads.
        joules_per_image: None where no counter can be read.
        meter: what was read, for how long, or why it could not be.
    """

    batch_size: int
    images: int
    seconds_per_image: float
    cpu_seconds_per_image: float
    joules_per_image: float | None
    meter: EnergyReading


@dataclass(frozen=True)
class EnergyReport:
    """All that ``neurocl spiking energy`` says.

    Attributes:
        timesteps: T.
        items: number of images measured on.
        constants: prices of the operations.
        layers: in the order in which they compute.
        spiking: totals as this program computes: a first layer that reads a static image is applied once.
        spiking_every_step: totals on a chip that repeats that layer at all T steps; equal where nothing is reused.
        ann: totals of the twin.
        firing_rate: spikes per neuron and step over all neurons.
        dead_share: share of all neurons that fired for no item.
        spikes: per image.
        timings: at batch 1 and with all items in one batch.
    """

    timesteps: int
    items: int
    constants: Constants
    layers: tuple[LayerEnergy, ...]
    spiking: Totals
    spiking_every_step: Totals
    ann: Totals
    firing_rate: float
    dead_share: float
    spikes: float
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def synaptic_operations(layer: nn.Conv2d | nn.Linear, spikes: Tensor) -> float:
    """Additions that a layer makes for its input: each spike times the number of outputs that it reaches.

    Args:
        layer: linear, or a convolution with zero padding, of any stride, dilation and number of groups.
        spikes: the layer's input; a value of magnitude n counts as n spikes.
    """
    if isinstance(layer, nn.Linear):
        return _sum(spikes.abs()) * layer.out_features
    # where a spike sits decides how many windows it is in; its channel does not, so channels are added up first
    per_position = spikes.abs().sum(dim=1).cpu().double().sum(dim=0)[None, None]
    window = torch.ones((1, 1, *layer.kernel_size), dtype=torch.float64)
    reached = F.conv2d(per_position, window, None, layer.stride, layer.padding, layer.dilation)
    return float(reached.sum()) * layer.out_channels / layer.groups


def measure_energy(
    network: SpikingClassifier,
    x: Tensor,
    *,
    mac_pj: float = 4.6,
    ac_pj: float = 0.9,
    byte_pj: float = 24.96,
) -> EnergyReport:
    """Count and time the inference of ``x``.

    Args:
        network: any spiking classifier made of Conv2d, Linear, NormLif and Lif modules; its mode is restored.
        x: normalised items [B, C, H, W] or event frames [B, T, C, H, W], on the network's device.
        mac_pj, ac_pj, byte_pj: picojoule per multiply-add, addition, and byte moved.

    Raises:
        ValueError: no items.
    """
    if not len(x):
        raise ValueError("energy is measured on at least one item, got none")
    constants = Constants(mac_pj, ac_pj, byte_pj)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            layers = tuple(_priced(layer, constants) for layer in _count(network, x))
            timings = (_timed(network, list(x[:BATCH_1_ITEMS].split(1))), _timed(network, [x]))
    finally:
        network.train(was_training)
    neurons, steps = sum(layer.neurons for layer in layers), network.timesteps
    spikes = sum(layer.spikes for layer in layers)
    dead = sum(layer.neurons * (layer.dead_share or 0.0) for layer in layers)
    return EnergyReport(
        timesteps=steps,
        items=len(x),
        constants=constants,
        layers=layers,
        spiking=_totals(
            constants,
            macs=sum(layer.macs for layer in layers),
            acs=sum(layer.acs for layer in layers),
            updates=sum(layer.updates for layer in layers),
            memory_bytes=sum(layer.memory_bytes for layer in layers),
        ),
        spiking_every_step=_totals(
            constants,
            macs=sum(layer.macs_every_step for layer in layers),
            acs=sum(layer.acs for layer in layers),
            updates=sum(layer.updates for layer in layers),
            memory_bytes=sum(layer.memory_bytes_every_step for layer in layers),
        ),
        ann=_totals(
            constants,
            macs=sum(layer.ann_macs for layer in layers),
            acs=sum(layer.ann_acs for layer in layers),
            updates=0.0,
            memory_bytes=sum(layer.ann_memory_bytes for layer in layers),
        ),
        firing_rate=spikes / (neurons * steps) if neurons else 0.0,
        dead_share=dead / neurons if neurons else 0.0,
        spikes=spikes,
        timings=timings,
    )


def measure_run(
    path: Path | str, *, samples: int = 64, device: str | None = None, threads: int | None = None
) -> EnergyReport:
    """Measure the network of a run on the first ``samples`` test items of its learnt tasks.

    Raises:
        UserError: not a run folder, a damaged checkpoint, no task learnt yet, or a network that does not spike.
    """
    run = load_run(path, device=device, threads=threads)
    return measure_energy(spiking_network(run), learnt_items(run, samples))


def spiking_network(run: LoadedRun) -> SpikingClassifier:
    """The run's network.

    Raises:
        UserError: it does not spike.
    """
    network = run.method.network
    if not isinstance(network, SpikingClassifier):
        raise UserError(
            f"{run.folder.path} trained {run.config.backbone}, a network without spikes; "
            "give a run of `neurocl spiking train`"
        )
    return network


def learnt_items(run: LoadedRun, samples: int) -> Tensor:
    """The first test items of all learnt tasks, in turn one of each, normalised, on the run's device.

    Returns: [n, C, H, W] or [n, T, C, H, W]; n is ``samples`` or all there are.
    Raises:
        UserError: the run has not finished its first task.
    """
    if not run.tasks_done:
        raise UserError(f"{run.folder.path} has not finished its first task; continue it with --resume")
    images = [run.scenario.test_data(task)[0][:samples] for task in range(run.tasks_done)]
    turns = sorted((index, task) for task, of_task in enumerate(images) for index in range(len(of_task)))[:samples]
    raw = torch.stack([images[task][index] for index, task in turns])
    return run.method.setting.augment.normalise(raw.to(run.runtime.device))


def _count(network: SpikingClassifier, x: Tensor) -> list[LayerEnergy]:
    """Run the network once and describe each layer that computes, without prices."""
    batch, steps = len(x), network.timesteps
    real_input = network.encoder.name == "static" and x.ndim == 4
    layers: list[LayerEnergy] = []

    def synapses(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            (data,) = inputs
            per_output = layer.weight[0].numel()
            outputs = output[0].numel() if isinstance(layer, nn.Conv2d) else layer.out_features
            values = data[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features
            applied = data.numel() // (values * batch)
            # black-and-white pictures hold whole numbers too, but a static input is a current and no spikes
            spiking = _is_whole(data) and not (real_input and not layers)
            macs = 0.0 if spiking else float(outputs * per_output)
            weights = NUMBER_BYTES * sum(parameter.numel() for parameter in layer.parameters())
            step = weights + values * (SPIKE_BYTES if spiking else NUMBER_BYTES)
            # a reused result is written once and read by the neurons at every step
            kept = NUMBER_BYTES * outputs * (1 + steps) if applied < steps else 0
            layers.append(
                LayerEnergy(
                    name,
                    "conv" if isinstance(layer, nn.Conv2d) else "linear",
                    macs=macs * applied,
                    acs=synaptic_operations(layer, data) / batch if spiking else 0.0,
                    macs_every_step=macs * steps,
                    memory_bytes=float(step * applied + kept),
                    memory_bytes_every_step=float(step * steps),
                    ann_macs=float(outputs * per_output),
                    ann_memory_bytes=float(weights + NUMBER_BYTES * (values + outputs)),
                )
            )

        return record

    def neurons(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def record(layer: nn.Module, inputs: tuple[Any, ...], spikes: Tensor) -> None:
            count = spikes[0, 0].numel()
            shortcut = isinstance(layer, Lif) and len(inputs) == 2
            arriving = [current for current in inputs if shortcut and _is_whole(current)]
            fired = _sum(spikes) / batch
            traffic = steps * count * (2 * NUMBER_BYTES + SPIKE_BYTES * (1 + len(arriving)))
            layers.append(
                LayerEnergy(
                    name,
                    "lif" if isinstance(layer, Lif) else "norm-lif",
                    acs=sum(_sum(current) for current in arriving) / batch,
                    updates=float(steps * count),
                    neurons=count,
                    spikes=fired,
                    firing_rate=fired / (steps * count),
                    dead_share=float((spikes.sum(dim=(0, 1)) == 0).double().mean()),
                    memory_bytes=traffic,
                    memory_bytes_every_step=traffic,
                    ann_acs=float(count) if shortcut else 0.0,
                )
            )

        return record

    handles = []
    inner = {module.lif for module in network.modules() if isinstance(module, NormLif)}
    for name, module in network.network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(synapses(name)))
        elif isinstance(module, NormLif) or (isinstance(module, Lif) and module not in inner):
            handles.append(module.register_forward_hook(neurons(name)))
    try:
        network(x)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def _is_whole(values: Tensor) -> bool:
    """Whether all values are whole numbers, as spikes and sums of spikes are."""
    return bool((values == values.round()).all())


def _sum(values: Tensor) -> float:
    """The sum in float64, which not every device has; rows of float32 whole numbers add up exactly."""
    return float(values.sum(dim=-1).cpu().double().sum())


def _priced(layer: LayerEnergy, constants: Constants) -> LayerEnergy:
    operations = constants.mac_pj * (layer.macs + layer.updates) + constants.ac_pj * layer.acs
    twin = constants.mac_pj * layer.ann_macs + constants.ac_pj * layer.ann_acs
    return replace(layer, compute_pj=operations, ann_pj=twin)


def _totals(constants: Constants, *, macs: float, acs: float, updates: float, memory_bytes: float) -> Totals:
    synapse_pj = constants.mac_pj * macs + constants.ac_pj * acs
    neuron_pj = constants.mac_pj * updates
    return Totals(
        macs,
        acs,
        updates,
        synapse_pj,
        neuron_pj,
        synapse_pj + neuron_pj,
        memory_bytes,
        constants.byte_pj * memory_bytes,
    )


def _timed(network: SpikingClassifier, batches: list[Tensor]) -> Timing:
    """Time passes over ``batches``, repeated until they fill the time that counters need."""
    device = batches[0].device

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    network(batches[0])
    finish()
    images = 0
    with EnergyMeter(device=str(device)) as meter:
        start = time.perf_counter()
        while not images or time.perf_counter() - start < TIMED_SECONDS:
            for batch in batches:
                network(batch)
                images += len(batch)
            finish()
    reading = meter.reading
    return Timing(
        batch_size=len(batches[0]),
        images=images,
        seconds_per_image=reading.seconds / images,
        cpu_seconds_per_image=reading.cpu_seconds / images,
        joules_per_image=None if reading.joules is None else reading.joules / images,
        meter=reading,
    )
