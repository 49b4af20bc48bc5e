"""FedProto: FedAvg whose clients draw their class means towards the federation's, the prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from neurocl.federated.class_table import ClassTable, dense, dense_shapes, row_objection, told, undensed
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import Loss, class_statistics, features_of
from neurocl.federated.method import Client, Place, Reply, Store
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload

PROTOTYPES, KNOWN = "prototypes", "known"


class FedProtoConfig(FedAvgConfig):
    """Of FedProto.

    Attributes:
        pull: weight of the distance to the prototypes.
        weights: as in the published code all clients count the same; or by their samples.
    """

    pull: Annotated[float, Field(ge=0)] = 0.1
    weights: Literal["samples", "equal"] = "equal"


class FedProto(FedAvg):
    """Weights are averaged too, as in the continual version; the original averages prototypes alone.

    Reference: Tan et al., "FedProto: federated prototype learning across heterogeneous clients", AAAI 2022,
    arXiv 2105.00243.
    """

    Config = FedProtoConfig
    config: FedProtoConfig
    reveals = "the client's trained weights, how many samples of each class it has and the mean of their features"

    def initial_state(self) -> Payload:
        shape = (self.problem.num_classes, self.problem.num_features)
        empty = {PROTOTYPES: np.zeros(shape, dtype=np.float32), KNOWN: np.zeros(shape[0], dtype=bool)}
        return Payload({**super().initial_state().arrays, **empty})

    def message(self, state: Payload, place: Place) -> Payload:
        weights = {name: state.arrays[name] for name in self.trained(self.network())}
        task = slice(place.task.classes.start, place.task.classes.stop)
        return Payload({**weights, PROTOTYPES: state.arrays[PROTOTYPES][task], KNOWN: state.arrays[KNOWN][task]})

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        first, last = place.task.classes.start, place.task.classes.stop
        prototypes = torch.tensor(message.arrays[PROTOTYPES], device=client.device)
        known = torch.tensor(message.arrays[KNOWN], device=client.device)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            features = network.features(x)
            value = F.cross_entropy(network.head(features)[:, first:last], y - first)
            return value + self.config.pull * prototype_distance(features, y - first, prototypes, known)

        return loss

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        trained = super().reply(network, client, place, message)
        found = class_statistics(features_of(network, client.data, client.device), client.data.y)
        arrays, meta = told(found.classes, found.counts, found.means)
        return Payload({**trained.arrays, **arrays}, {**trained.meta, **meta})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        size = state.arrays[PROTOTYPES].shape[1]
        return super().objection(state, place, reply) or row_objection(reply, place.task.classes, size)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        names = self.trained(self.network())
        averaged = super().aggregate(state, place, replies)
        pooled = ClassTable.received(replies).pooled()
        prototypes, known = state.arrays[PROTOTYPES].copy(), state.arrays[KNOWN].copy()
        prototypes[pooled.classes], known[pooled.classes] = pooled.means, True
        weights = {name: averaged.arrays[name] for name in names}
        return Payload({**weights, PROTOTYPES: prototypes, KNOWN: known}, state.meta)

    def summed(self, state: Payload, place: Place) -> dict[str, tuple[int, ...]]:
        return super().summed(state, place) | dense_shapes(place.task.classes, self.problem.num_features)

    def summand(self, place: Place, reply: Payload) -> Store:
        weights = super().summand(place, Payload({name: reply.arrays[name] for name in self._names}, reply.meta))
        return weights | dense(reply, place.task.classes)

    def of_sum(self, state: Payload, place: Place, total: Store) -> Payload:
        averaged = super().of_sum(state, place, total)
        arrays, meta = undensed(total, place.task.classes)
        return Payload({**averaged.arrays, **arrays}, {**averaged.meta, **meta})


def prototype_distance(features: Tensor, labels: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """Sum over the classes of a batch of the mean squared distance of its class mean to the prototype.

    Args:
        features: [B, d].
        labels: [B], rows of ``prototypes``.
        prototypes: [c, d].
        known: which of them there are, [c].
    """
    counts = labels.bincount(minlength=len(prototypes))
    sums = torch.zeros_like(prototypes).index_add(0, labels, features)
    means = sums / counts[:, None].clamp(min=1)
    distance = (means - prototypes).square().mean(dim=1)
    return distance[known & (counts > 0)].sum()
