"""FisherAvg: the server averages every weight by how sure each client is of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import batches
from neurocl.federated.lora import Form, form, misfit
from neurocl.federated.method import Client, Place, Reply, Samples, Store, Task
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.merging.fisher import fisher_merging

FISHER = "fisher."
FLOOR = 1e-12
GRADIENT_VALUES = 1 << 24  # of all samples of one batch


class FisherAvgConfig(FedAvgConfig):
    """Of FisherAvg.

    Attributes:
        weights: the Fisher information is a sum over samples, so clients with more of them count more.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
    """

    weights: Literal["samples"] = "samples"


class FisherAvg(FedAvg):
    """Clients send the diagonal of their Fisher information with their weights.

    Reference: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022, arXiv 2111.09832, in
    every round of McMahan et al., AISTATS 2017, arXiv 1602.05629.
    """

    Config = FisherAvgConfig
    config: FisherAvgConfig
    sum_only = False
    reveals = "the client's trained weights, the squared gradients of each, summed, and its number of samples"

    def reply(self, network: Classifier, client: Client, place: Place, message: Payload) -> Payload:
        answer = super().reply(network, client, place, message)
        found = diagonal_fisher(network, self.trained(network), client.data, place.task, client.device)
        return Payload({**answer.arrays, **arrays_of(found, FISHER)}, answer.meta)

    def wanted(self, state: Payload) -> dict[str, Form]:
        """Shape and type of every array that a reply must have."""
        own = {name: form(state, name) for name in state.arrays}
        return own | {FISHER + name: found for name, found in own.items()}

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        reason = misfit(reply, self.wanted(state))
        if reason:
            return reason
        for name, array in reply.arrays.items():
            if name.startswith(FISHER) and array.min(initial=0) < 0:
                return f"{name} is no Fisher information: it has negative entries"
        return ""

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        each = [tensors(reply.payload) for reply in replies]
        merged: dict[str, Tensor] = {}
        for name, base in tensors(state).items():
            models = torch.stack([own[name].double() for own in each])
            fisher = torch.stack([own[FISHER + name].double() for own in each])
            merged[name] = fisher_merging(base.double(), models, fisher=fisher, floor=FLOOR).to(base.dtype)
        arrays: Store = arrays_of(merged)
        return Payload({**state.arrays, **arrays}, state.meta)


def diagonal_fisher(
    network: Classifier, names: Sequence[str], samples: Samples, task: Task, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Sum over samples of p(y|x) (d log p(y|x) / d theta)^2 with the true label y, among the classes of the task.

    Args:
        network: put in eval mode.
        names: of the parameters wanted.
        samples: the client's.
        task: whose classes compete.
        device: where the network is.
    Returns: by name, float32, shaped like the parameters.
    """
    network.eval()
    everything = {name: value.detach() for name, value in network.named_parameters()}
    chosen = {name: everything[name] for name in names}
    rest = {name: value for name, value in everything.items() if name not in chosen}

    def log_probability(own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(network, {**rest, **own}, (x[None],))[0, task.classes.start : task.classes.stop]
        value = -F.cross_entropy(logits[None], y[None])
        return value, value

    gradients = vmap(grad(log_probability, has_aux=True), in_dims=(None, 0, 0))
    size = max(1, GRADIENT_VALUES // max(1, sum(value.numel() for value in chosen.values())))
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in chosen.items()}
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches(samples, size):
            found, value = gradients(chosen, batch.x.to(device), (batch.y - task.classes.start).to(device))
            for name, gradient in found.items():
                total[name] += torch.einsum("n,n...->...", value.exp(), gradient.square()).double()
    return {name: value.float().cpu() for name, value in total.items()}
