"""RegMean in a federation: linear layers whose responses are nearest to those of all clients on their own inputs.

``K`` clients; ``o`` outputs and ``i`` inputs of a linear layer, G_k = X_k^T X_k [i, i] the Gram matrix of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import input_grams
from neurocl.federated.lora import Form, form, misfit, negative_gram
from neurocl.federated.method import Client, Place, Reply
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.merging.lorm import regmean_weights
from neurocl.merging.regmean import shrunk

GRAM, WEIGHT = "gram.", ".weight"


class FedRegMeanConfig(FedAvgConfig):
    """Of RegMean.

    Attributes:
        weights: clients count by their samples, or all the same, in everything but the weights of linear layers.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        alpha: factor on the Gram matrices' entries off the diagonal; with 0 only diagonals are sent.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5


class FedRegMean(FedAvg):
    """Merge linear layers in closed form: W + [sum_k (W_k - W) G_k] (sum_k G_k)^+; average everything else.

    What no client's inputs reach stays as the server had it.

    Reference: Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless knowledge fusion by merging weights of language models",
    ICLR 2023, arXiv 2212.09849, in every round of McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    Config = FedRegMeanConfig
    config: FedRegMeanConfig
    sum_only = False
    reveals = "the client's trained weights, the Gram matrix of every linear layer's inputs and its number of samples"

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        answer = super().reply(network, client, place, message)
        layers = self.linear_layers(message)
        diagonal = [] if self.config.alpha else layers
        grams = input_grams(network, layers, client.data, diagonal=diagonal, device=client.device)
        if self.config.alpha:
            grams = {name: shrunk(gram[None], self.config.alpha)[0] for name, gram in grams.items()}
        found = arrays_of({name: gram.float() for name, gram in grams.items()}, GRAM)
        return Payload({**answer.arrays, **found}, answer.meta)

    def linear_layers(self, state: Payload) -> list[str]:
        """The trained linear layers, head included, sorted."""
        network = self.network()
        linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        weights = [name.removesuffix(WEIGHT) for name in state.arrays if name.endswith(WEIGHT)]
        return [layer for layer in weights if layer in linear]

    def wanted(self, state: Payload) -> dict[str, Form]:
        """Shape and type of every array that a reply must have."""
        found = {name: form(state, name) for name in state.arrays}
        for layer in self.linear_layers(state):
            inputs = state.arrays[layer + WEIGHT].shape[1]
            found[GRAM + layer] = ((inputs, inputs) if self.config.alpha else (inputs,), "float32")
        return found

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        reason = misfit(reply, self.wanted(state))
        return reason or negative_gram(reply, GRAM)

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        averaged = super().aggregate(state, place, replies)
        each, old = [tensors(reply.payload) for reply in replies], tensors(state)
        merged = {}
        for layer in self.linear_layers(state):
            name = layer + WEIGHT
            base = old[name].double()
            changes = torch.stack([own[name].double() - base for own in each])
            grams = torch.stack([own[GRAM + layer].double() for own in each])
            merged[name] = (base + regmean_weights(changes, grams, unseen="zero")).float()
        return Payload({**averaged.arrays, **arrays_of(merged)}, state.meta)
