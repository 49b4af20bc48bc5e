"""Export of a spiking network to NIR, with proof: the written graph is replayed and must give the same spikes.

What NIR can say exactly: its LIF and IF neurons fire strictly above the threshold and then set the membrane to a
fixed value at once. In steps of dt (forward Euler) a LIF with tau = dt / (1 - decay) and r = 1 / (1 - decay) is

    v = decay * v + x;   fires where v > threshold, and there v = 0

which is our neuron with ``reset="hard"``; at ``decay=1`` it is the IF. At ``decay=0`` nothing is left to subtract
from, so ``immediate`` is the same neuron. Every other reset subtracts, which no NIR neuron does, and spikingjelly's
back end fires at the threshold: such networks are refused. BatchNorm goes into the weights in front, in float64;
the encoder stays outside the graph, whose input is one encoded step and whose output one step's logits.

Reference: Pedersen et al., "Neuromorphic intermediate representation", Nature Communications 15, 2024.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from neurocl.continual.training import load_run
from neurocl.data.catalog import load_benchmark
from neurocl.errors import UserError
from neurocl.runs import write_atomically
from neurocl.spiking.energy import learnt_items, spiking_network
from neurocl.spiking.network import Lif, NormLif, SpikingBlock, SpikingClassifier, SpikingMlp, SpikingResNet

if TYPE_CHECKING:
    import nir

Float64 = NDArray[np.float64]

DT = 1e-4  # seconds per step, the value that importers of NIR assume unless told otherwise
CHECKED_ITEMS = 16


@dataclass(frozen=True)
class Exported:
    """A written and verified file.

    Attributes:
        path: the file.
        layers: layers of neurons in the graph.
        checked_steps: steps replayed, over all test items.
        checked_neurons: outputs of neurons compared, over all steps; every one was equal.
        spikes: how many of them were spikes.
    """

    path: Path
    layers: int
    checked_steps: int
    checked_neurons: int
    spikes: int


def export_run(run: Path | str, out: Path | None = None) -> Exported:
    """Write a run's network as NIR (HDF5) after replaying it on test items of the run's learnt tasks.

    Args:
        run: a run folder.
        out: a file that does not exist yet; by default ``RUN/model.nir``, which is replaced.

    Raises:
        UserError: the package nir is missing; not a run, or nothing learnt; the network does not spike, or NIR cannot
            express it (the message names the first such layer); ``out`` exists; or the replay differs.
        RunError: the file cannot be written.
    """
    _require_nir()
    loaded = load_run(run, device="cpu")
    network = spiking_network(loaded)
    path = loaded.folder.path / "model.nir" if out is None else out
    if out is not None and out.exists():
        raise UserError(f"{out} exists; choose another --out")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; make it first or choose another --out")
    items = learnt_items(loaded, CHECKED_ITEMS)
    graph = to_nir(network, loaded.scenario.input_shape)
    benchmark = load_benchmark(loaded.config.dataset)
    graph.metadata |= {
        "dataset": loaded.config.dataset,
        "classes": ", ".join(loaded.scenario.class_names),
        "input": "pixels in 0..1" if benchmark.mean is None else "pixels in 0..1, minus mean, divided by std",
    }
    if benchmark.mean is not None and benchmark.std is not None:
        graph.metadata |= {"mean": np.array(benchmark.mean), "std": np.array(benchmark.std)}
    data = _serialized(graph)
    steps, neurons, spikes = _verify(network, items, _deserialized(data))
    write_atomically(path, data)
    return Exported(path, len(_neuron_layers(network)), steps, neurons, spikes)


def to_nir(network: SpikingClassifier, input_shape: Sequence[int]) -> nir.NIRGraph:
    """The network as a graph of float64 NIR nodes, named after its layers with underscores for dots.

    Args:
        network: a spiking perceptron or ResNet with trained statistics.
        input_shape: of one item, (C, H, W) or event frames (T, C, H, W).

    Returns: a graph from one encoded step [C, H, W] to one step's logits [K].
    Raises:
        UserError: the package nir is missing, or the first layer that NIR cannot express, and what to train instead.
    """
    _require_nir()
    network = copy.deepcopy(network).cpu().double().eval().requires_grad_(False)
    for name, layer in _neuron_layers(network).items():
        _check_neuron(name, layer)
    builder = _Builder([int(size) for size in input_shape[-3:]])
    body = network.network
    if isinstance(body, SpikingMlp):
        end = _perceptron(builder, body)
    elif isinstance(body, SpikingResNet):
        end = _residual(builder, body)
    else:
        raise UserError(f"{type(body).__name__} has no NIR export; spiking-mlp and the spiking ResNets do")
    return builder.graph(
        end,
        {
            "encoder": f"{network.encoder.name}, outside the graph",
            "timesteps": network.timesteps,
            "dt": DT,
            "discretisation": "forward Euler",
            "output": "logits of one step; classify by their mean over time",
        },
    )


def replay(graph: nir.NIRGraph, x_seq: Tensor) -> dict[str, Tensor]:
    """Run a graph step by step, from its nodes alone: a reading of NIR that shares no code with the networks.

    Args:
        graph: nodes of the kinds that :func:`to_nir` writes, without loops.
        x_seq: input [T, B, ...], float64.

    Returns: the output of every node over time, [T, B, ...].
    Raises:
        ValueError: a node of another kind, or a loop.
    """
    order = _topological(graph)
    sources = {name: [a for a, b in graph.edges if b == name] for name in order}
    membranes: dict[str, Tensor] = {}
    outputs: dict[str, list[Tensor]] = {name: [] for name in order}
    for x in x_seq:
        now: dict[str, Tensor] = {}
        for name in order:
            # edges that end in one node add up
            arriving = x if not sources[name] else torch.stack([now[source] for source in sources[name]]).sum(dim=0)
            now[name] = _step(graph.nodes[name], name, arriving, membranes)
            outputs[name].append(now[name])
    return {name: torch.stack(steps) for name, steps in outputs.items()}


def _require_nir() -> None:
    try:
        import nir  # noqa: F401
    except ImportError:
        raise UserError("the export needs the package nir; install it with pip install 'neurocl[nir]'") from None


def _neuron_layers(network: SpikingClassifier) -> dict[str, NormLif | Lif]:
    """Layers of neurons by name, in the order of the network's definition."""
    named = dict(network.network.named_modules())
    inner = {module.lif for module in named.values() if isinstance(module, NormLif)}
    return {
        name: module
        for name, module in named.items()
        if isinstance(module, NormLif) or (isinstance(module, Lif) and module not in inner)
    }


def _check_neuron(name: str, layer: NormLif | Lif) -> None:
    neurons = layer.lif if isinstance(layer, NormLif) else layer
    settings, decay = neurons.neuron, float(neurons.decay)
    advice = "train with --set neuron.reset=hard to export"
    if settings.backend == "spikingjelly":
        raise UserError(
            f"layer {name} cannot be written as NIR: spikingjelly's neuron fires at the threshold, NIR's strictly "
            "above it; train with --set neuron.backend=auto --set neuron.reset=hard to export"
        )
    if settings.reset == "delayed" or (settings.reset == "immediate" and decay != 0):
        when = "one step later" if settings.reset == "delayed" else "at once"
        raise UserError(
            f"layer {name} cannot be written as NIR: neuron.reset={settings.reset} subtracts the threshold {when}, "
            f"NIR's neurons set the membrane to a fixed value; {advice}"
        )
    if not 0 <= decay <= 1:
        raise UserError(
            f"layer {name} cannot be written as NIR: its learnt decay {decay:.4g} is outside 0..1, where NIR's time "
            "constant does not exist; train with --set neuron.learnable=false to export"
        )


class _Builder:
    """Collects nodes and edges; a layer is added behind the names that it reads from."""

    def __init__(self, shape: list[int]) -> None:
        import nir

        self.nir: Any = nir
        self.nodes: dict[str, Any] = {"input": nir.Input(input_type={"input": np.array(shape)})}
        self.edges: list[tuple[str, str]] = []
        self.shapes: dict[str, list[int]] = {"input": shape}

    def add(self, name: str, node: Any, shape: list[int], *sources: str) -> str:
        name = name.replace(".", "_")
        self.nodes[name], self.shapes[name] = node, shape
        self.edges += [(source, name) for source in sources]
        return name

    def flatten(self, source: str) -> str:
        shape = self.shapes[source]
        node = self.nir.Flatten(input_type={"input": np.array(shape)}, start_dim=0, end_dim=-1)
        return self.add(f"{source}_flat", node, [math.prod(shape)], source)

    def linear(self, name: str, layer: nn.Linear, norm: nn.BatchNorm1d | None, source: str) -> str:
        weight, bias = _folded(layer, norm)
        node = self.nir.Linear(weight) if norm is None and layer.bias is None else self.nir.Affine(weight, bias)
        return self.add(name, node, [layer.out_features], source)

    def conv(self, name: str, layer: nn.Conv2d, norm: nn.BatchNorm2d, source: str) -> str:
        weight, bias = _folded(layer, norm)
        size = tuple(self.shapes[source][1:])
        assert not isinstance(layer.padding, str)
        node = self.nir.Conv2d(
            input_shape=size,
            weight=weight,
            stride=tuple(layer.stride),
            padding=tuple(layer.padding),
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            bias=bias,
        )
        return self.add(name, node, [int(length) for length in node.output_type["output"]], source)

    def neurons(self, name: str, lif: Lif, *sources: str) -> str:
        shape = self.shapes[sources[0]]
        decay, threshold = float(lif.decay), np.full(shape, float(lif.threshold))
        zero = np.zeros(shape)
        if decay == 1:
            node = self.nir.IF(r=np.full(shape, 1 / DT), v_threshold=threshold, v_reset=zero)
        else:
            tau = DT / (1 - decay)
            # rate * (1 / rate) rounds to 1 or just below: whole numbers that meet the threshold stay at or under it
            node = self.nir.LIF(
                tau=np.full(shape, tau),
                r=np.full(shape, 1 / (DT / tau)),
                v_leak=zero,
                v_threshold=threshold,
                v_reset=zero,
            )
        return self.add(name, node, shape, *sources)

    def graph(self, end: str, metadata: dict[str, Any]) -> nir.NIRGraph:
        output = self.nir.Output(output_type={"output": np.array(self.shapes[end])})
        self.add("output", output, self.shapes[end], end)
        return self.nir.NIRGraph(self.nodes, self.edges, metadata=metadata)


def _folded(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d | None) -> tuple[Float64, Float64]:
    """Weight and bias of a layer with the normalisation behind it, in float64."""
    weight = layer.weight
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        bias = (bias - norm.running_mean) * scale + norm.bias
    return weight.numpy(), bias.numpy()


def _perceptron(builder: _Builder, network: SpikingMlp) -> str:
    end = builder.flatten("input")
    for index, (layer, neurons) in enumerate(zip(network.hidden, network.lifs, strict=True)):
        assert isinstance(layer, nn.Linear)
        assert isinstance(neurons, NormLif)
        assert isinstance(neurons.norm, nn.BatchNorm1d)
        end = builder.linear(f"hidden.{index}", layer, neurons.norm, end)
        end = builder.neurons(f"lifs.{index}", neurons.lif, end)
    return builder.linear("head", network.head, None, end)


def _residual(builder: _Builder, network: SpikingResNet) -> str:
    end = _conv_neurons(builder, "stem", network.stem, "stem_lif", network.stem_lif, "input")
    for name, block in network.named_modules():
        if isinstance(block, SpikingBlock):
            end = _block(builder, name, block, end)
    size = builder.shapes[end]
    pool = builder.nir.AvgPool2d(kernel_size=np.array(size[1:]), stride=np.array(size[1:]), padding=np.array([0, 0]))
    end = builder.flatten(builder.add("pool", pool, [size[0], 1, 1], end))
    return builder.linear("head", network.head, None, end)


def _block(builder: _Builder, name: str, block: SpikingBlock, source: str) -> str:
    end = _conv_neurons(builder, f"{name}.conv1", block.conv1, f"{name}.lif1", block.lif1, source)
    end = _conv_neurons(builder, f"{name}.conv2", block.conv2, f"{name}.lif2", block.lif2, end)
    identity = source
    if block.shortcut is not None:
        conv, norm = block.shortcut
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        identity = builder.conv(f"{name}.shortcut", conv, norm, source)
    return builder.neurons(f"{name}.lif3", block.lif3, end, identity)


def _conv_neurons(
    builder: _Builder, name: str, conv: nn.Conv2d, neurons_name: str, neurons: NormLif, source: str
) -> str:
    assert isinstance(neurons.norm, nn.BatchNorm2d)
    return builder.neurons(neurons_name, neurons.lif, builder.conv(name, conv, neurons.norm, source))


def _topological(graph: nir.NIRGraph) -> list[str]:
    order: list[str] = []
    waiting = list(graph.nodes)
    while waiting:
        ready = [name for name in waiting if all(a in order for a, b in graph.edges if b == name)]
        if not ready:
            raise ValueError(f"the graph has a loop through {', '.join(waiting)}")
        order += ready
        waiting = [name for name in waiting if name not in ready]
    return order


def _step(node: Any, name: str, x: Tensor, membranes: dict[str, Tensor]) -> Tensor:
    """One step of one node, [B, ...] -> [B, ...]; neurons keep their membrane in ``membranes``."""
    kind = type(node).__name__
    if kind in ("Input", "Output"):
        return x
    if kind == "Flatten":
        # dimensions of a node do not count the batch
        first, last = (int(dim) + (int(dim) >= 0) for dim in (node.start_dim, node.end_dim))
        return x.flatten(first, last)
    if kind == "Linear":
        return x @ torch.as_tensor(node.weight).T
    if kind == "Affine":
        return x @ torch.as_tensor(node.weight).T + torch.as_tensor(node.bias)
    if kind == "Conv2d":
        stride, padding, dilation = (
            [int(v) for v in np.ravel(value)] for value in (node.stride, node.padding, node.dilation)
        )
        weight, bias = torch.as_tensor(node.weight), torch.as_tensor(node.bias)
        return F.conv2d(x, weight, bias, stride, padding, dilation, int(node.groups))
    if kind == "AvgPool2d":
        kernel, stride, padding = (
            [int(v) for v in np.ravel(value)] for value in (node.kernel_size, node.stride, node.padding)
        )
        return F.avg_pool2d(x, kernel, stride, padding)
    if kind not in ("LIF", "IF"):
        raise ValueError(f"node {name} is a {kind}, which the replay does not know")
    v = membranes.get(name, torch.zeros_like(x))
    r, threshold, reset = (torch.as_tensor(value) for value in (node.r, node.v_threshold, node.v_reset))
    if kind == "LIF":
        rate = DT / torch.as_tensor(node.tau)
        v = (1 - rate) * v + rate * torch.as_tensor(node.v_leak) + (rate * r) * x
    else:
        v = v + (DT * r) * x
    spikes = v > threshold
    membranes[name] = torch.where(spikes, reset, v)
    return spikes.to(x.dtype)


def _serialized(graph: nir.NIRGraph) -> bytes:
    import nir

    stream = io.BytesIO()
    nir.write(stream, graph)
    return stream.getvalue()


def _deserialized(data: bytes) -> nir.NIRGraph:
    import nir

    return nir.read(io.BytesIO(data))


@torch.no_grad()
def _verify(network: SpikingClassifier, items: Tensor, graph: nir.NIRGraph) -> tuple[int, int, int]:
    """Compare every spike of the network in float64 with the replay of ``graph``; steps, outputs and spikes compared.

    Raises:
        UserError: a spike differs.
    """
    network = copy.deepcopy(network).cpu().double().eval()
    recorded: dict[str, Tensor] = {}
    for name, layer in _neuron_layers(network).items():
        layer.register_forward_hook(lambda _layer, _inputs, spikes, name=name: recorded.update({name: spikes}))
    steps = compared = fired = 0
    # one item at a time: the outputs of all nodes are kept, and a large network has millions of them a step
    for item in items.double().split(1):
        x_seq = network.encoder(item)
        network.network(x_seq)
        replayed = replay(graph, x_seq)
        for name, spikes in recorded.items():
            differing = int((spikes != replayed[name.replace(".", "_")]).sum())
            if differing:
                raise UserError(
                    f"layer {name}: {differing} of {spikes.numel()} outputs differ between the network and the NIR "
                    "graph by rounding at the threshold; nothing was written. A decay of 0.5 or 0.75 is exact in both"
                )
            compared += spikes.numel()
            fired += int(spikes.sum())
        steps += len(x_seq)
    return steps, compared, fired
