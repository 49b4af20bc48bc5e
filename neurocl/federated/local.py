"""Local: every client learns alone and keeps its model, a lower bound for federations."""

from __future__ import annotations

from collections.abc import Sequence

from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Client, Place, Reply
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload


class Local(FedAvg):
    """Nothing but counts of samples is sent. Accuracies are means over the clients' models, each on all test samples.

    Clients go on with their own weights from round to round and from task to task.
    """

    sum_only = False
    personal = True
    reveals = "its number of samples"

    def message(self, state: Payload, place: Place) -> Payload:
        return Payload()

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        return ()

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        return super().client(client, place, Payload(client.store))

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        trained = super().reply(network, client, place, message)
        client.store.update(trained.arrays)
        return Payload(meta=trained.meta)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        return state
