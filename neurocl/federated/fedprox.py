"""FedProx: FedAvg whose clients are pulled back to the weights that the server sent."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import Loss
from neurocl.federated.method import Client, Place
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, tensors


class FedProxConfig(FedAvgConfig):
    """Of FedProx.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        mu: strength of the pull; 0 is FedAvg, 0.001 to 1 are usual.
    """

    mu: Annotated[float, Field(ge=0)] = 0.01


class FedProx(FedAvg):
    """Clients add mu/2 times the squared distance from the server's weights to their loss.

    Reference: Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, arXiv 1812.06127.
    """

    Config = FedProxConfig
    config: FedProxConfig

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        plain = super().loss(network, client, place, message)
        if self.config.mu == 0:
            return plain
        start = {name: value.to(client.device) for name, value in tensors(message).items()}
        pairs = [(parameter, start[name]) for name, parameter in self._own(network).items()]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            distance = sum((parameter - old).square().sum() for parameter, old in pairs)
            return plain(x, y) + self.config.mu / 2 * distance

        return loss
