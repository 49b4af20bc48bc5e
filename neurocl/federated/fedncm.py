"""FedNCM: the class means of a frozen backbone, added up over clients, are the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from neurocl.federated.class_table import ClassTable, dense, dense_shapes, row_objection, told, undensed
from neurocl.federated.local_training import class_statistics, features_of
from neurocl.federated.method import Client, FederatedMethod, MethodConfig, Phase, Place, Predictor, Reply, Store, Task
from neurocl.federated.network import Classifier, evaluating
from neurocl.federated.payload import Payload

KEPT = "told."


class FedNcmConfig(MethodConfig):
    """Of FedNCM.

    Attributes:
        min_count: clients do not tell classes of which they have fewer samples; the mean of one sample is the sample.
        forgettable: the server keeps every client's means, so that it can forget one; else only their sums.
    """

    min_count: Annotated[int, Field(ge=1)] = 1
    forgettable: bool = True


class FedNcm(FederatedMethod):
    """Nearest class mean by cosine: one message for each task, no training.

    Reference: Legate et al., "Guiding the last layer in federated learning with pre-trained models", NeurIPS 2023,
    arXiv 2306.03937.
    """

    Config = FedNcmConfig
    config: FedNcmConfig
    reveals = "how many samples of each class a client has and the mean of their features"

    def phases(self, task: Task) -> Sequence[Phase]:
        return (Phase("statistics", 1, train=False),)

    def initial_state(self) -> Payload:
        return Payload(ClassTable.empty(self.problem.num_features).store(KEPT))

    def message(self, state: Payload, place: Place) -> Payload:
        # Everybody has the frozen backbone.
        return Payload()

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        features = features_of(self.problem.network(), client.data, client.device)
        found = class_statistics(features, client.data.y, min_count=self.config.min_count)
        arrays, meta = told(found.classes, found.counts, found.means)
        return Payload(arrays, {"n": len(client.data), **meta})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        num_features = state.arrays[f"{KEPT}means"].shape[1]
        return row_objection(reply, place.task.classes, num_features, min_count=self.config.min_count)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        table = ClassTable.kept(state.arrays, KEPT).joined(ClassTable.received(replies))
        return Payload((table if self.config.forgettable else table.pooled()).store(KEPT), state.meta)

    def summed(self, state: Payload, place: Place) -> dict[str, tuple[int, ...]]:
        return {"n": (), **dense_shapes(place.task.classes, self.problem.num_features)}

    def summand(self, place: Place, reply: Payload) -> Store:
        return {"n": np.array(reply.meta["n"]), **dense(reply, place.task.classes)}

    def of_sum(self, state: Payload, place: Place, total: Store) -> Payload:
        arrays, meta = undensed(total, place.task.classes)
        return Payload(arrays, {"n": int(total["n"]), **meta})

    def forget(self, state: Payload, client: int) -> Payload:
        if not self.config.forgettable:
            return super().forget(state, client)
        return Payload(ClassTable.kept(state.arrays, KEPT).without(client).store(KEPT), state.meta)

    def classifier(self, state: Payload) -> Tensor:
        """Rows [C, d] of length one; NaN for classes that nobody has."""
        table = ClassTable.kept(state.arrays, KEPT).pooled()
        weight = unseen_rows(self.problem.num_classes, table.means.shape[1])
        weight[torch.from_numpy(table.classes)] = normalised_rows(torch.from_numpy(table.means).double())
        return weight

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return cosine_predictor(self.problem.network(), self.classifier(state))

    def folded(self, state: Payload, task: Task) -> Classifier:
        return with_rows(self.problem.network(), self.classifier(state))


def unseen_rows(num_classes: int, num_features: int) -> Tensor:
    """Weights [C, d] of classes that nobody has: NaN, so that no score can be mistaken for one."""
    return torch.full((num_classes, num_features), float("nan"), dtype=torch.float64)


def normalised_rows(weight: Tensor) -> Tensor:
    """Rows of length one; zeros stay."""
    found: Tensor = weight / weight.norm(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return found


def cosine_predictor(network: Classifier, weight: Tensor) -> Predictor:
    """Scores <W_c, f> of the network's features; minus infinity for classes whose row is NaN.

    Args:
        network: whose backbone is used; it gets the rows for its head.
        weight: [C, d].
    """
    with_rows(network, weight)

    def predict(x: Tensor) -> Tensor:
        with evaluating(network):
            found: Tensor = network(x)
        return found

    return predict


@torch.no_grad()
def with_rows(network: Classifier, weight: Tensor) -> Classifier:
    """The network with a head that gives the scores of :func:`cosine_predictor`.

    Args:
        network: changed.
        weight: [C, d].
    """
    unseen = weight.isnan().any(dim=1)
    network.head.weight.copy_(weight.masked_fill(unseen[:, None], 0.0))
    network.head.bias.copy_(torch.zeros(len(weight)).masked_fill(unseen, -torch.inf))
    return network
