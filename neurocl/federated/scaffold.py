"""SCAFFOLD: control variates take out of every client's steps what sets its gradient apart from the others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from neurocl.errors import UserError
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import Loss, make_optimizer
from neurocl.federated.lora import Form, form, misfit
from neurocl.federated.method import Client, MethodConfig, Place, Reply, mean_arrays, weighted_sum
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, tensors

CONTROL = "control."
# Plain SGD takes far larger steps than the AdamW that a source's learning rate is meant for.
LR_FACTOR = 100.0


class ScaffoldConfig(FedAvgConfig):
    """Of SCAFFOLD.

    Attributes:
        weights: clients count all the same, as published, or by their samples; their control variates always the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        server_lr: step of the server along the mean change of the clients.
    """

    weights: Literal["samples", "equal"] = "equal"
    server_lr: Annotated[float, Field(gt=0)] = 1.0


class Scaffold(FedAvg):
    """Clients step along g - c_k + c; c_k is their mean gradient of the last round, c the mean of all c_k.

    With S steps from theta to theta_k, c_k <- c_k - c + (theta - theta_k) / (S lr): the formula holds for plain SGD.
    A client that never took part has c_k = 0.

    Reference: Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated learning", ICML 2020, arXiv
    1910.06378, option II.
    """

    Config = ScaffoldConfig
    config: ScaffoldConfig
    reveals = "the client's trained weights, its mean gradient's change and its number of samples"

    def __init__(self, problem: Any, config: MethodConfig) -> None:
        super().__init__(problem, config)
        if problem.config.optimizer != "sgd":
            raise UserError(
                "scaffold needs plain SGD: its control variates mean nothing to AdamW; set optimizer to sgd"
            )

    @property
    def lr(self) -> float:
        """Of the head; where the run sets none, what suits plain SGD."""
        asked: float | None = self.problem.config.lr
        return asked if asked is not None else LR_FACTOR * float(self.problem.source.lr)

    def learning_rate(self, name: str) -> float:
        """Of a trained parameter."""
        return self.lr if name.startswith("head.") else self.lr * self.config.backbone_lr

    def optimizer(self, network: Classifier) -> torch.optim.Optimizer:
        groups = [{"params": [value], "lr": self.learning_rate(name)} for name, value in self._own(network).items()]
        return make_optimizer("sgd", groups, self.lr, self.problem.config.weight_decay)

    def initial_state(self) -> Payload:
        state = super().initial_state()
        return Payload({**state.arrays, **{CONTROL + name: np.zeros_like(own) for name, own in state.arrays.items()}})

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        plain = super().loss(network, client, place, message)
        server, own = tensors(message, CONTROL), tensors(Payload(client.store), CONTROL)
        pairs = [
            (parameter, (server[name] - own.get(name, torch.zeros_like(server[name]))).to(client.device))
            for name, parameter in self._own(network).items()
        ]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            # A linear term adds its factor to the gradient.
            return plain(x, y) + sum((parameter * shift).sum() for parameter, shift in pairs)

        return loss

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        answer = super().reply(network, client, place, message)
        config = self.problem.config
        steps = config.local_epochs * -(-len(client.data) // config.batch_size)
        changes = {}
        for name, trained in answer.arrays.items():
            moved = message.arrays[name].astype(np.float64) - trained
            change = moved / (steps * self.learning_rate(name)) - message.arrays[CONTROL + name]
            changes[CONTROL + name] = change.astype(np.float32)
            before = client.store.get(CONTROL + name, np.zeros_like(trained))
            client.store[CONTROL + name] = before + changes[CONTROL + name]
        return Payload({**answer.arrays, **changes}, answer.meta)

    def wanted(self, state: Payload) -> dict[str, Form]:
        """Shape and type of every array that a reply must have."""
        return {name: form(state, name) for name in state.arrays}

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        return misfit(reply, self.wanted(state))

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        names = self.expected(state, place)
        merged = {}
        for name, mean in mean_arrays(replies, names, self.weights(replies)).items():
            if self.config.server_lr != 1:
                mean = weighted_sum([state.arrays[name], mean], [1 - self.config.server_lr, self.config.server_lr])
            changes = [reply.payload.arrays[CONTROL + name] for reply in replies]
            shares = [1.0] + [1 / self.problem.num_clients] * len(changes)
            merged[name] = mean
            merged[CONTROL + name] = weighted_sum([state.arrays[CONTROL + name], *changes], shares)
        return Payload({**state.arrays, **merged}, state.meta)
