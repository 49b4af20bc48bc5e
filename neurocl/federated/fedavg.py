"""FedAvg: clients train everything, the server averages what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from neurocl.federated.local_training import Loss, make_optimizer, task_loss, train
from neurocl.federated.method import (
    Client,
    FederatedMethod,
    MethodConfig,
    Place,
    Predictor,
    Reply,
    Store,
    Task,
    mean_arrays,
    shares,
)
from neurocl.federated.network import Classifier, evaluating, load, parameters_of
from neurocl.federated.payload import Payload, arrays_of, tensors


class FedAvgConfig(MethodConfig):
    """Of FedAvg.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
    """

    weights: Literal["samples", "equal"] = "samples"
    train: Literal["all", "head"] = "all"
    backbone_lr: Annotated[float, Field(gt=0)] = 1.0


class FedAvg(FederatedMethod):
    """Base class of all methods that train parameters of the network and send them.

    Reference: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS
    2017, arXiv 1602.05629.
    """

    Config = FedAvgConfig
    config: FedAvgConfig
    reveals = "the client's trained weights and its number of samples"

    def network(self) -> Classifier:
        """The network at its start, with whatever the method adds to it."""
        network: Classifier = self.problem.network()
        return network

    def trained(self, network: Classifier) -> list[str]:
        """Names of the parameters that clients train and send."""
        return network.head_names() + (network.backbone_names() if self.config.train == "all" else [])

    def initial_state(self) -> Payload:
        network = self.network()
        return Payload(arrays_of({name: value.detach() for name, value in self._own(network).items()}))

    def _own(self, network: Classifier) -> dict[str, torch.nn.Parameter]:
        return parameters_of(network, self.trained(network))

    def loaded(self, payload: Payload) -> Classifier:
        """The network with the weights of a state or message."""
        network = self.network()
        names = set(self.trained(network))
        load(network, {name: value for name, value in tensors(payload).items() if name in names})
        return network

    def message(self, state: Payload, place: Place) -> Payload:
        return state

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        return self._names

    @cached_property
    def _names(self) -> list[str]:
        # Asked for with every reply; the network is not built again each time.
        return self.trained(self.network())

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        """What clients minimise; cross-entropy over the classes of the task."""
        return task_loss(network, place.task)

    def optimizer(self, network: Classifier) -> torch.optim.Optimizer:
        """A new one for every round."""
        config = self.problem.config
        head = list(network.head.parameters())
        rest = [value for name, value in self._own(network).items() if not name.startswith("head.")]
        groups: list[dict[str, Any]] = [{"params": head, "lr": self.problem.lr}]
        if rest:
            groups.append({"params": rest, "lr": self.problem.lr * self.config.backbone_lr})
        return make_optimizer(config.optimizer, groups, self.problem.lr, config.weight_decay)

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if not len(client.data):
            return Payload(meta={"n": 0})
        config = self.problem.config
        network = self.loaded(message)
        own = self._own(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in own)
        network.train()
        train(
            self.loss(network, client, place, message),
            self.optimizer(network),
            client,
            place,
            epochs=self.epochs(place, message),
            batch_size=config.batch_size,
            clip=config.clip,
            after_step=self.after_step(network, client, place, message),
        )
        return self.reply(network, client, place, message)

    def epochs(self, place: Place, message: Payload) -> int:
        """How often a client goes over its data."""
        epochs: int = self.problem.config.local_epochs
        return epochs

    def after_step(
        self, network: Classifier, client: Client, place: Place, message: Payload
    ) -> Callable[[], None] | None:
        """What follows every update of a client's training; it may keep what it finds in the client's store."""
        return None

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        """What a client sends after training."""
        trained = {name: value.detach() for name, value in self._own(network).items()}
        return Payload(arrays_of(trained), {"n": len(client.data)})

    def weights(self, replies: Sequence[Reply]) -> NDArray[np.float64]:
        """Of the replies in the average; they add up to 1."""
        if self.config.weights == "equal":
            return np.full(len(replies), 1 / len(replies))
        return shares(replies)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        names = self.expected(state, place)
        return Payload({**state.arrays, **mean_arrays(replies, names, self.weights(replies))}, state.meta)

    def summed(self, state: Payload, place: Place) -> dict[str, tuple[int, ...]]:
        return {"n": (), **{name: state.arrays[name].shape for name in self.expected(state, place)}}

    def summand(self, place: Place, reply: Payload) -> Store:
        weight = 1.0 if self.config.weights == "equal" else float(reply.meta["n"])  # type: ignore[arg-type]
        parts = {name: weight * array.astype(np.float64) for name, array in reply.arrays.items()}
        return {"n": np.array(weight), **parts}

    def of_sum(self, state: Payload, place: Place, total: Store) -> Payload:
        count = float(total["n"])
        means = {name: (total[name] / count).astype(state.arrays[name].dtype) for name in self.expected(state, place)}
        return Payload(means, {"n": round(count)})

    def model(self, state: Payload, task: Task) -> Classifier:
        """The server's network after a task."""
        return self.loaded(state)

    def folded(self, state: Payload, task: Task) -> Classifier | None:
        if type(self).predictor is not FedAvg.predictor:
            return None
        network = self.model(state, task)
        return network if network.state_dict().keys() == self.problem.network().state_dict().keys() else None

    def for_prediction(self, state: Payload) -> Payload:
        return Payload({name: state.arrays[name] for name in self._names})

    def predictor(self, state: Payload, task: Task) -> Predictor:
        network = self.model(state, task)

        def predict(x: torch.Tensor) -> torch.Tensor:
            with evaluating(network):
                found: torch.Tensor = network(x.to(self.problem.config.device))
            return found

        return predict
