"""DER++: every client rehearses samples of its own past, with their labels and the scores that they had."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import Loss
from neurocl.federated.method import Client, Place
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload
from neurocl.federated.reservoir import Reservoir


class DerppConfig(FedAvgConfig):
    """Of DER++; without any weight, or without a buffer, it is FedAvg.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        buffer_size: samples that a client keeps.
        replay_batch: samples of it in each of the two batches of a step.
        alpha: weight of the squared distance to the stored scores.
        beta: weight of the cross-entropy with the stored labels.
    """

    buffer_size: Annotated[int, Field(ge=0)] = 200
    replay_batch: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(ge=0)] = 0.5
    beta: Annotated[float, Field(ge=0)] = 0.5


class Derpp(FedAvg):
    """FedAvg with a reservoir on every client, which no message ever holds anything of.

    As in the original every step offers its batch to the reservoir with the scores of all classes before the step, so
    a sample comes back in every epoch. Replayed labels compete among the classes seen so far.

    Reference: Buzzega et al., "Dark experience for general continual learning: a strong, simple baseline", NeurIPS
    2020, arXiv 2004.07211.
    """

    Config = DerppConfig
    config: DerppConfig

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        config = self.config
        if config.buffer_size == 0:
            return super().loss(network, client, place, message)
        buffer = Reservoir(client.store, config.buffer_size, client.generator(place, "reservoir"))
        first, seen = place.task.classes.start, place.task.classes.stop

        def replayed() -> tuple[Tensor, dict[str, Tensor]]:
            found = {name: value.to(client.device) for name, value in buffer.draw(config.replay_batch).items()}
            return network(found["x"]), found

        def loss(x: Tensor, y: Tensor) -> Tensor:
            logits = network(x)
            value = F.cross_entropy(logits[:, first:seen], y - first)
            if len(buffer) and config.alpha:
                scores, stored = replayed()
                value = value + config.alpha * F.mse_loss(scores, stored["logits"])
            if len(buffer) and config.beta:
                scores, stored = replayed()
                value = value + config.beta * F.cross_entropy(scores[:, :seen], stored["y"])
            buffer.offer({"x": x, "y": y, "logits": logits})
            return value

        return loss
