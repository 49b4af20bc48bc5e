"""EWC: clients are pulled back to the last task's weights, each weight as strongly as earlier tasks depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.fisheravg import FISHER, diagonal_fisher
from neurocl.federated.local_training import Loss
from neurocl.federated.lora import form, misfit
from neurocl.federated.method import Client, Phase, Place, Reply, Store, Task, weighted_sum
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, arrays_of, tensors

ANCHOR = "anchor."


class EwcConfig(FedAvgConfig):
    """Of EWC.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        strength: of the pull, lambda; 0 is FedAvg.
        keep: share of the Fisher information that is left after another task, gamma.
    """

    strength: Annotated[float, Field(ge=0)] = 1.0
    keep: Annotated[float, Field(ge=0, le=1)] = 0.9


class Ewc(FedAvg):
    """Online EWC: clients add lambda sum_i F_i (theta_i - theta*_i)^2 to their loss.

    theta* are the server's weights at the end of the last task, where all clients are asked for their Fisher
    information: F <- gamma F + sum_k F_k / n, with F_k the sum over client k's samples and n the samples of all.

    Reference: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796;
    online as in Schwarz et al., "Progress & compress", ICML 2018, arXiv 1805.06370.
    """

    Config = EwcConfig
    config: EwcConfig
    reveals = "the client's trained weights, the squared gradients of each, summed, and its number of samples"

    def phases(self, task: Task) -> Sequence[Phase]:
        return (*super().phases(task), Phase("fisher", train=False))

    def message(self, state: Payload, place: Place) -> Payload:
        return state if place.phase.train else Payload(self._weights(state))

    def _weights(self, state: Payload) -> Store:
        return {name: state.arrays[name] for name in self._names}

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        plain = super().loss(network, client, place, message)
        fisher, anchor = tensors(message, FISHER), tensors(message, ANCHOR)
        if not fisher or self.config.strength == 0:
            return plain
        pulled = [
            (parameter, fisher[name].to(client.device), anchor[name].to(client.device))
            for name, parameter in self._own(network).items()
        ]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            distance = sum((own * (parameter - old).square()).sum() for parameter, own, old in pulled)
            return plain(x, y) + self.config.strength * distance

        return loss

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if place.phase.train or not len(client.data):
            return super().client(client, place, message)
        network = self.loaded(message)
        found = diagonal_fisher(network, self._names, client.data, place.task, client.device)
        return Payload(arrays_of(found, FISHER), {"n": len(client.data)})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        if place.phase.train:
            return super().objection(state, place, reply)
        reason = misfit(reply, {FISHER + name: form(state, name) for name in self._names})
        if reason:
            return reason
        if not isinstance(reply.meta["n"], int):
            return "the number of samples is not whole"
        negative = [name for name in self._names if reply.arrays[FISHER + name].min(initial=0) < 0]
        return f"{FISHER}{negative[0]} is no Fisher information: it has negative entries" if negative else ""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        if place.phase.train:
            return super().aggregate(state, place, replies)
        count = sum(float(reply.payload.meta["n"]) for reply in replies)  # type: ignore[arg-type,misc]
        found = {}
        for name in (FISHER + own for own in self._names):
            sums, shares = [reply.payload.arrays[name] for reply in replies], [1 / count] * len(replies)
            if name in state.arrays:
                sums, shares = [state.arrays[name], *sums], [self.config.keep, *shares]
            found[name] = weighted_sum(sums, shares)
        return Payload({**state.arrays, **found}, state.meta)

    def end_task(self, state: Payload, task: Task) -> Payload:
        anchors = {ANCHOR + name: array for name, array in self._weights(state).items()}
        return Payload({**state.arrays, **anchors}, state.meta)
