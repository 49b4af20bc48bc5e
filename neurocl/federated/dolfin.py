"""DOLFIN: every task trains the output side of adapters whose input side avoids what earlier tasks need.

``K`` clients, ``C`` classes; ``o`` outputs, ``i`` inputs and ``r`` rank of an adapted layer.

An adapter is ``up`` [o, r] times ``down`` [r, i]. ``down`` is computed by the server at the beginning of a task, out of
the Gram matrices of the clients' inputs and of the memory of earlier tasks, and is the same for all clients; ``up`` is
trained and averaged, which averages the products. The state holds both for the current task, ``past.<layer>`` [o, i],
the products of earlier tasks added up, ``gram.<layer>`` [i, i] and the memory ``basis.<layer>`` [i, m].
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.errors import UserError
from neurocl.federated.dual_gpm import Energy, Memory, free_directions, remembered, threshold
from neurocl.federated.local_training import input_grams
from neurocl.federated.lora import HEAD, PAST, AdapterConfig, AdapterMethod, Form, form, misfit
from neurocl.federated.method import Client, Phase, Place, Reply, Store, Task, mean_arrays
from neurocl.federated.network import Classifier, linear_layers, load
from neurocl.federated.payload import Payload, arrays_of, tensors

SUBSPACE, MEMORY = "subspace", "memory"
UP, DOWN = ".up", ".down"
GRAM, BASIS, COMPLEMENT = "gram.", "basis.", "complement."
QKV = "attn.qkv"
Share = Annotated[float, Field(ge=0, le=1)]


class DolfinConfig(AdapterConfig):
    """Of DOLFIN.

    Attributes:
        weights: clients count by their samples, or all the same; Gram matrices are sums over samples in any case.
        train: the adapters and the head; there is nothing else.
        backbone_lr: learning rate of the adapters as a share of the head's.
        rank: r.
        first_threshold, last_threshold: share of a task's energy that is protected afterwards: in the first task, and
            what it rises to.
        energy: of a direction: its singular value of the Gram matrix squared, as published, or as it is.
        down_scale: length of the rows of ``down``.
        sketch: clients send only that many leading directions of each Gram matrix; 0 sends all of it.
    """

    first_threshold: Share = 0.95
    last_threshold: Share = 1.0
    energy: Energy = "squared"
    down_scale: Annotated[float, Field(gt=0)] = 3**-0.5
    sketch: Annotated[int, Field(ge=0)] = 0


class SubspaceLinear(nn.Module):
    """A frozen linear layer plus up (down x) on its outputs from ``skip`` on.

    Args:
        layer: the layer that is adapted; its parameters are frozen.
        rank: r.
        skip: outputs at the beginning that have no adapter.

    ``up`` [o - skip, r] is trained and starts at zero, ``down`` [r, i] is a buffer.
    """

    down: Tensor

    def __init__(self, layer: nn.Linear, rank: int, skip: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.skip = skip
        self.up = nn.Parameter(torch.zeros(layer.out_features - skip, rank))
        self.register_buffer("down", torch.zeros(rank, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.down), self.up)
        out: Tensor = self.layer(x) + F.pad(change, (self.skip, 0))
        return out


class Dolfin(AdapterMethod):
    """Adapters in the null space of earlier tasks, on keys and values; on all linear layers of other backbones.

    Reference: Moussadek, Salami and Calderara, "DOLFIN: balancing stability and plasticity in federated continual
    learning", ICIAP 2025, arXiv 2510.13567.
    """

    Config = DolfinConfig
    config: DolfinConfig
    reveals = "the trained factor and head, n, and twice per task the Gram matrices of every adapted layer's inputs"

    def phases(self, task: Task) -> Sequence[Phase]:
        return (Phase(SUBSPACE, train=False), *super().phases(task), Phase(MEMORY, train=False))

    def network(self) -> Classifier:
        network: Classifier = self.problem.network()
        network.backbone.requires_grad_(False)
        places, layers = self.problem.source.lora_places, linear_layers(network)
        attention = [name for name in layers if name.endswith(QKV)]
        adapted = attention or [name for name in layers if not places or any(place in name for place in places)]
        if not adapted:
            raise UserError(f"no linear layer of the backbone is called {' or '.join(places)}")
        for name in adapted:
            parent, _, own = name.rpartition(".")
            # Queries come before keys and values.
            skip = layers[name].out_features // 3 if attention else 0
            setattr(network.get_submodule(parent), own, SubspaceLinear(layers[name], self.config.rank, skip))
        return network.to(self.problem.config.device)

    def initial_state(self) -> Payload:
        network = self.network()
        found = {name: value.detach() for name, value in network.named_parameters() if name in HEAD}
        meta = {}
        for name, module in network.named_modules():
            if isinstance(module, SubspaceLinear):
                outputs, inputs = len(module.up), module.layer.in_features
                found[name + UP], found[name + DOWN] = module.up.detach(), module.down
                found[PAST + name] = torch.zeros(outputs, inputs, dtype=torch.float64)
                found[GRAM + name] = torch.zeros(inputs, inputs, dtype=torch.float64)
                found[BASIS + name] = Memory.empty(inputs).basis
                meta[COMPLEMENT + name] = False
        return Payload(arrays_of(found), dict(meta))

    def begin_task(self, state: Payload, task: Task) -> Payload:
        if task.index == 0:
            return state
        arrays = {PAST + layer: total.numpy() for layer, total in self._sums(state).items()}
        # Should nobody answer in the first phase, the backbone stays as it is: old directions are not free any more.
        for layer in layers_of(state):
            for name in (layer + UP, layer + DOWN, GRAM + layer):
                arrays[name] = np.zeros_like(state.arrays[name])
        return Payload({**state.arrays, **arrays}, state.meta)

    def message(self, state: Payload, place: Place) -> Payload:
        sent = {PAST + layer: state.arrays[PAST + layer].astype(np.float32) for layer in layers_of(state)}
        if place.phase.name != SUBSPACE:
            sent |= {layer + end: state.arrays[layer + end] for layer in layers_of(state) for end in (UP, DOWN)}
        if place.phase.train:
            sent |= {name: state.arrays[name] for name in HEAD}
        return Payload(sent)

    def loaded(self, payload: Payload) -> Classifier:
        network = self.network()
        load(
            network,
            {name: value for name, value in tensors(payload).items() if name in HEAD or name.endswith((UP, DOWN))},
        )
        with torch.no_grad():
            for layer, past in tensors(payload, PAST).items():
                module = network.get_submodule(layer)
                assert isinstance(module, SubspaceLinear)
                module.layer.weight[module.skip :] += past.to(module.layer.weight)
        return network

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if place.phase.train or not len(client.data):
            return super().client(client, place, message)
        layers = {
            f"{name.removeprefix(PAST)}.layer": name.removeprefix(PAST)
            for name in message.arrays
            if name.startswith(PAST)
        }
        grams = input_grams(self.loaded(message), layers, client.data, device=client.device)
        sent = {layers[name]: self._sketch(gram).float() for name, gram in grams.items()}
        return Payload(arrays_of(sent, GRAM), {"n": len(client.data)})

    def _sketch(self, gram: Tensor) -> Tensor:
        """The Gram matrix [i, i], or rows [q, i] whose own Gram matrix is nearest to it."""
        if not self.config.sketch:
            return gram
        values, vectors = torch.linalg.eigh(gram)
        rows: Tensor = (vectors * values.clamp(min=0).sqrt())[:, -self.config.sketch :].T
        return rows

    def wanted(self, state: Payload, place: Place) -> dict[str, Form]:
        layers = layers_of(state)
        if place.phase.train:
            return {name: form(state, name) for name in [*HEAD, *(layer + UP for layer in layers)]}
        found: dict[str, Form] = {}
        for layer in layers:
            inputs = state.arrays[GRAM + layer].shape[0]
            rows = min(self.config.sketch, inputs) if self.config.sketch else inputs
            found[GRAM + layer] = ((rows, inputs), "float32")
        return found

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        reason = misfit(reply, self.wanted(state, place))
        if reason or place.phase.train or self.config.sketch:
            return reason
        for layer in layers_of(state):
            gram = reply.arrays[GRAM + layer]
            if np.diagonal(gram).min(initial=0) < 0 or not np.allclose(gram, gram.T, atol=1e-5 * np.abs(gram).max()):
                return f"{GRAM}{layer} is no Gram matrix: it must be symmetric and its diagonal not negative"
        return ""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        if place.phase.train:
            names = self.expected(state, place)
            return Payload({**state.arrays, **mean_arrays(replies, names, self.weights(replies))}, state.meta)
        arrays = self._gathered(state, replies)
        if place.phase.name == SUBSPACE:
            for layer in layers_of(state):
                arrays[layer + DOWN] = self._down(state, layer, torch.from_numpy(arrays[GRAM + layer]))
        return Payload({**state.arrays, **arrays}, state.meta)

    def _gathered(self, state: Payload, replies: Sequence[Reply]) -> Store:
        """The Gram matrices of the inputs of all clients, float64."""
        totals = {GRAM + layer: np.zeros_like(state.arrays[GRAM + layer]) for layer in layers_of(state)}
        for reply in replies:
            for name in totals:
                sent = reply.payload.arrays[name].astype(np.float64)
                totals[name] += sent.T @ sent if self.config.sketch else (sent + sent.T) / 2
        return totals

    def _down(self, state: Payload, layer: str, gram: Tensor) -> np.ndarray:
        rank = self.config.rank
        rows = free_directions(gram, memory_of(state, layer), rank)
        found = int(rows.any(dim=1).sum())
        if found < rank:
            warnings.warn(f"{layer} has {found} of {rank} directions left for this task", stacklevel=2)
        array: np.ndarray = (rows * self.config.down_scale).float().numpy()
        return array

    def end_task(self, state: Payload, task: Task) -> Payload:
        # If nobody answered in the last phase, the Gram matrices are those of the first.
        share = threshold(self.config.first_threshold, self.config.last_threshold, task.index, len(self.problem.tasks))
        arrays, meta = dict(state.arrays), dict(state.meta)
        for layer in layers_of(state):
            gram = torch.from_numpy(np.array(state.arrays[GRAM + layer]))
            memory = remembered(memory_of(state, layer), gram, share, energy=self.config.energy)
            arrays[BASIS + layer], meta[COMPLEMENT + layer] = memory.basis.numpy(), memory.complement
        return Payload(arrays, meta)

    def _sums(self, state: Payload) -> dict[str, Tensor]:
        """What all tasks so far add to the adapted outputs of each layer, float64 [o - skip, i]."""
        own = tensors(state)
        return {
            layer: own[PAST + layer] + own[layer + UP].double() @ own[layer + DOWN].double()
            for layer in layers_of(state)
        }

    def change(self, state: Payload, task: int) -> dict[str, Tensor]:
        layers = linear_layers(self.problem.network())
        return {
            layer: F.pad(total, (0, 0, layers[layer].out_features - len(total), 0))
            for layer, total in self._sums(state).items()
        }


def layers_of(payload: Payload) -> list[str]:
    """Names of the adapted layers, sorted."""
    return [name.removeprefix(BASIS) for name in payload.arrays if name.startswith(BASIS)]


def memory_of(state: Payload, layer: str) -> Memory:
    """What earlier tasks need of a layer's inputs."""
    return Memory(torch.from_numpy(np.array(state.arrays[BASIS + layer])), bool(state.meta[COMPLEMENT + layer]))
