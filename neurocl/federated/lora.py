"""LoRA in a federation: clients train adapters of a frozen backbone and the head, the server averages each factor.

``K`` clients, ``C`` classes, ``d`` features; ``o`` outputs, ``i`` inputs and ``r`` rank of an adapted layer.

The state holds, for every adapted layer, the factors ``<layer>.lora_A`` [r, i] and ``<layer>.lora_B`` [o, r] of the
current task, and ``past.<layer>`` [o, i], what the modules of earlier tasks add to the frozen weight.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import EVALUATION_BATCH, make_optimizer
from neurocl.federated.method import Place, Predictor, Store, Task
from neurocl.federated.network import HEAD_BIAS, HEAD_WEIGHT, Classifier, evaluating, linear_layers, load, with_lora
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.federated.randomness import torch_stream

FACTOR_A, FACTOR_B = ".lora_A", ".lora_B"
PAST = "past."
HEAD = (HEAD_WEIGHT, HEAD_BIAS)

# Adapters stand learning rates that would destroy a backbone; this factor is that of the small reference problem.
LR_FACTOR = 3.0

Form = tuple[tuple[int, ...], str]


class AdapterConfig(FedAvgConfig):
    """Of methods with adapters.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the adapters and the head; there is nothing else.
        backbone_lr: learning rate of the adapters as a share of the head's.
        rank: r.
    """

    train: Literal["all"] = "all"
    rank: Annotated[int, Field(ge=1)] = 4


class AdapterMethod(FedAvg):
    """Base class: every task begins with a new adapter B A of each linear layer, B = 0 and A drawn by the server."""

    Config = AdapterConfig
    config: AdapterConfig

    @property
    def lr(self) -> float:
        """Of the head; where the run sets none, three times that of full fine-tuning."""
        asked: float | None = self.problem.config.lr
        return asked if asked is not None else LR_FACTOR * float(self.problem.source.lr)

    def network(self) -> Classifier:
        network: Classifier = self.problem.network()
        # The factors are overwritten; drawing their start must not touch anybody else's random numbers.
        with torch.random.fork_rng(devices=[]):
            with_lora(network, self.config.rank, self.problem.source.lora_places)
        return network.to(self.problem.config.device)

    def trained(self, network: Classifier) -> list[str]:
        return [name for name, parameter in network.named_parameters() if parameter.requires_grad]

    def initial_state(self) -> Payload:
        network = self.network()
        found = {name: value.detach() for name, value in network.named_parameters() if name in HEAD}
        for name, value in network.named_parameters():
            if name.endswith((FACTOR_A, FACTOR_B)):
                found[name] = value.detach()
        layers = [name.removesuffix(FACTOR_A) for name in found if name.endswith(FACTOR_A)]
        for layer in layers:
            found[PAST + layer] = torch.zeros(len(found[layer + FACTOR_B]), found[layer + FACTOR_A].shape[1])
        arrays = arrays_of(found)
        return Payload(arrays | self.fresh_factors(Payload(arrays), 0))

    def fresh_factors(self, state: Payload, task: int) -> Store:
        """B = 0 and A Kaiming-uniform, the same in every run with this seed."""
        generator = torch_stream(self.problem.config.seed, "server adapters", task)
        found = {}
        for layer in layers_of(state):
            shape = state.arrays[layer + FACTOR_A].shape
            bound = 1 / math.sqrt(shape[1])
            found[layer + FACTOR_A] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            found[layer + FACTOR_B] = torch.zeros(state.arrays[layer + FACTOR_B].shape)
        return arrays_of(found)

    def message(self, state: Payload, place: Place) -> Payload:
        return Payload({name: state.arrays[name] for name in own_names(state)})

    def loaded(self, payload: Payload) -> Classifier:
        network = self.network()
        load(network, {name: value for name, value in tensors(payload).items() if name in own_names(payload)})
        with torch.no_grad():
            for layer, past in tensors(payload, PAST).items():
                weight = network.get_submodule(layer + ".layer").weight
                assert isinstance(weight, Tensor)
                weight += past.to(weight)
        return network

    def learning_rate(self, name: str) -> float:
        """Of a trained parameter."""
        return self.lr if name in HEAD else self.lr * self.config.backbone_lr

    def optimizer(self, network: Classifier) -> torch.optim.Optimizer:
        config = self.problem.config
        # Decay would shrink the head's rows of earlier classes, which get no gradient.
        groups = [
            {
                "params": [parameter],
                "lr": self.learning_rate(name),
                "weight_decay": 0.0 if name in HEAD else config.weight_decay,
            }
            for name, parameter in self._own(network).items()
        ]
        return make_optimizer(config.optimizer, groups, self.lr)

    def wanted(self, state: Payload, place: Place) -> dict[str, Form]:
        """Shape and type of every array that a reply must have."""
        return {name: form(state, name) for name in own_names(state)}

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        return list(self.wanted(state, place))

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        return misfit(reply, self.wanted(state, place))

    @abstractmethod
    def change(self, state: Payload, task: int) -> dict[str, Tensor]:
        """What the modules of all tasks up to this one add to the frozen weights, by layer, float64 [o, i]."""

    def folded(self, state: Payload, task: Task) -> Classifier:
        network: Classifier = self.problem.network()
        load(network, {name: value for name, value in tensors(state).items() if name in HEAD})
        layers = linear_layers(network)
        with torch.no_grad():
            for name, change in self.change(state, task.index).items():
                layers[name].weight += change.to(layers[name].weight)
        return network

    def predictor(self, state: Payload, task: Task) -> Predictor:
        network, device = self.folded(state, task), torch.device(self.problem.config.device)

        def predict(x: Tensor) -> Tensor:
            with evaluating(network):
                return torch.cat([network(rows.to(device)) for rows in x.split(EVALUATION_BATCH)])

        return predict


class LoraConfig(AdapterConfig):
    """Of LoRA.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the adapters and the head; there is nothing else.
        backbone_lr: learning rate of the adapters as a share of the head's.
        rank: r.
        previous: what becomes of the modules of earlier tasks. ``individual_mean``: every task is trained on the
            frozen weights alone and tested with the mean of all modules; ``run_mean``: it is trained on top of the mean
            of the earlier ones; ``run_sum``: trained and tested on top of their sum.
    """

    previous: Literal["individual_mean", "run_sum", "run_mean"] = "individual_mean"


class Lora(AdapterMethod):
    """Average the factors A and B of all clients separately, and the head.

    The product of the averages is not the average of the products: see ``ffa-lora`` and ``lorm``.

    Reference: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022, arXiv 2106.09685, averaged
    as in McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    Config = LoraConfig
    config: LoraConfig
    reveals = "the client's trained factors and head and its number of samples; the server needs only weighted sums"

    def begin_task(self, state: Payload, task: Task) -> Payload:
        if task.index == 0:
            return state
        past = {layer: change.float() for layer, change in self.change(state, task.index - 1).items()}
        fresh = self.fresh_factors(state, task.index)
        return Payload({**state.arrays, **arrays_of(past, PAST), **fresh}, state.meta)

    def message(self, state: Payload, place: Place) -> Payload:
        sent = dict(super().message(state, place).arrays)
        if self.config.previous != "individual_mean" and place.task.index > 0:
            sent |= {name: array for name, array in state.arrays.items() if name.startswith(PAST)}
        return Payload(sent)

    def module(self, state: Payload) -> dict[str, Tensor]:
        """The current task's B A by layer, float64 [o, i]."""
        own = tensors(state)
        return {layer: own[layer + FACTOR_B].double() @ own[layer + FACTOR_A].double() for layer in layers_of(state)}

    def change(self, state: Payload, task: int) -> dict[str, Tensor]:
        past = tensors(state, PAST)
        if self.config.previous == "run_sum":
            return {layer: past[layer].double() + module for layer, module in self.module(state).items()}
        return {
            layer: (task * past[layer].double() + module) / (task + 1) for layer, module in self.module(state).items()
        }


class FfaLora(Lora):
    """LoRA whose A stays as the server drew it, so that averaging B averages the products.

    Reference: Sun et al., "Improving LoRA in privacy-preserving federated learning", ICLR 2024, arXiv 2403.12313.
    """

    reveals = "the client's trained factor B and head and its number of samples; the server needs only weighted sums"

    def network(self) -> Classifier:
        network = super().network()
        for name, parameter in network.named_parameters():
            if name.endswith(FACTOR_A):
                parameter.requires_grad_(False)
        return network

    def wanted(self, state: Payload, place: Place) -> dict[str, Form]:
        return {name: found for name, found in super().wanted(state, place).items() if not name.endswith(FACTOR_A)}


def layers_of(payload: Payload) -> list[str]:
    """Names of the adapted layers, sorted."""
    return [name.removesuffix(FACTOR_A) for name in payload.arrays if name.endswith(FACTOR_A)]


def own_names(payload: Payload) -> list[str]:
    """Names of the arrays that are parameters of the network: factors and head."""
    return [name for name in payload.arrays if name in HEAD or name.endswith((FACTOR_A, FACTOR_B))]


def form(payload: Payload, name: str) -> Form:
    """Shape and type of an array."""
    array = payload.arrays[name]
    return array.shape, array.dtype.name


def negative_gram(reply: Payload, prefix: str) -> str:
    """Which array whose name begins so cannot be a Gram matrix, or the diagonal of one; or nothing."""
    for name, array in reply.arrays.items():
        if name.startswith(prefix) and (np.diagonal(array) if array.ndim == 2 else array).min(initial=0) < 0:
            return f"{name} is no Gram matrix: its diagonal has negative entries"
    return ""


def misfit(reply: Payload, wanted: Mapping[str, Form]) -> str:
    """What is wrong with the names, shapes and types of a reply's arrays; empty if nothing is."""
    for name, (shape, kind) in wanted.items():
        if name not in reply.arrays:
            return f"{name} is missing"
        found, given = form(reply, name)
        if found != shape:
            return f"{name} has shape {list(found)}, expected {list(shape)}"
        if given != kind:
            return f"{name} is {given}, expected {kind}"
    return ""
