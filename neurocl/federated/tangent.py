"""FedAvg on the displacement of a network's first-order expansion around its start, made to have clients removed.

``K`` clients, ``B`` batch, ``C`` classes, ``r`` rank, ``A`` scales. tau is the displacement of the trained parameters
from where they started; sums of displacements are sums of functions if the network is expanded.

The state holds tau under the names of the parameters; ``entered`` [K], the share with which each client entered the
average, summed over rounds; and with ``ledger`` each client's part of tau, ``ledger.<client>.<parameter>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from neurocl.errors import UserError
from neurocl.federated.fedavg import FedAvg, FedAvgConfig
from neurocl.federated.local_training import EVALUATION_BATCH, Loss, batches, task_loss
from neurocl.federated.lora import FACTOR_A, FACTOR_B, misfit
from neurocl.federated.method import Client, Phase, Place, Predictor, Reply, Store, Task, weighted_sum
from neurocl.federated.network import Classifier, load, parameters_of, with_lora
from neurocl.federated.payload import Payload, tensors
from neurocl.federated.problem import Problem
from neurocl.federated.randomness import torch_stream
from neurocl.merging.linearised import first_order

ENTERED, LEDGER, VECTOR, ALPHAS, RIGHT = "entered", "ledger.", "vector.", "alphas", "right"

#: a client trains alone, for the displacement that removes it; meta ``epochs``, from tau = 0 if no arrays are sent
REMOVAL = Phase("removal")
#: clients count right answers of tau - alpha vector for each of ``alphas``
CONTROL = Phase("control", train=False)

#: alpha = 0, 0.05 ... 1
SCALES = tuple(step / 20 for step in range(21))

LARGEST_LEDGER = 1 << 30


class TangentConfig(FedAvgConfig):
    """Of tangent.

    Attributes:
        weights: clients count by their samples, or all the same.
        train: the whole network or the head alone.
        backbone_lr: learning rate of the backbone as a share of the head's.
        linear: train the first-order expansion of the network; else the network itself, for comparison.
        ledger: the server keeps what each client contributed to tau, K times its size, so that it can remove one alone.
        rank: 0 moves weights directly; r > 0 moves only B of frozen-down LoRA, W + B A with A drawn once, in which the
            expansion stays linear.
        head_std: of the head's first weights, drawn from the run's seed; with 0 the backbone has no gradient at the
            start, and so the expansion does not depend on it.
    """

    linear: bool = True
    ledger: bool = False
    rank: Annotated[int, Field(ge=0)] = 0
    head_std: Annotated[float, Field(ge=0)] = 0.05


class Displaced(nn.Module):
    """The network moved by tau: its first-order expansion around ``start``, or the network itself.

    Batch statistics and dropout stay as they are in ``start``.

    Args:
        start: the network where it began.
        tau: displacement by parameter; gradients flow back to it.
        linear: f(start) + J tau instead of f(start + tau).

    Reference: Ortiz-Jimenez, Favero and Frossard, "Task Arithmetic in the Tangent Space", NeurIPS 2023,
    arXiv 2305.12827.
    """

    def __init__(self, start: nn.Module, tau: Mapping[str, Tensor], *, linear: bool = True) -> None:
        super().__init__()
        own = dict(start.named_parameters())
        self.start, self.tau, self.linear = start, tau, linear
        self._origin = {name: own[name].detach() for name in tau}

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            value, change = first_order(self.start, self._origin, self.tau, x)
            return value.detach() + change
        moved = {name: self._origin[name] + change for name, change in self.tau.items()}
        out: Tensor = functional_call(self.start, moved, (x,))
        return out


class Tangent(FedAvg):
    """FedAvg on tau, from 0: averages of displacements are averages of functions, so that clients can be subtracted.

    The design is ours: the paper, read in its abstract and introduction only, combines task arithmetic with the neural
    tangent kernel; no parity with it is claimed. See :mod:`neurocl.federated.unlearning`.

    Reference: Santi, Salami and Calderara, "Towards robust knowledge removal in federated learning with high data
    heterogeneity", ICIAP 2025, arXiv 2510.13606.
    """

    Config = TangentConfig
    config: TangentConfig
    reveals = (
        "the client's displacement of the weights and its number of samples, and with ledger the server keeps what the "
        "client contributed"
    )

    def network(self) -> Classifier:
        return start_network(self.problem, self.config.rank, self.config.head_std)

    def trained(self, network: Classifier) -> list[str]:
        return trained_names(network, self.config.rank, self.config.train)

    @cached_property
    def _start(self) -> Classifier:
        return self.network().requires_grad_(False).eval()

    def initial_state(self) -> Payload:
        zero = {name: np.zeros_like(array) for name, array in super().initial_state().arrays.items()}
        size = self.problem.num_clients * sum(array.nbytes for array in zero.values())
        if self.config.ledger and size > LARGEST_LEDGER:
            raise UserError(
                f"a ledger of {self.problem.num_clients} clients takes {size} bytes, at most {LARGEST_LEDGER} are "
                "kept; set rank, or train to head, or ledger to false"
            )
        return Payload({**zero, ENTERED: np.zeros(self.problem.num_clients)})

    def message(self, state: Payload, place: Place) -> Payload:
        return Payload(self.tau(state))

    def tau(self, state: Payload) -> Store:
        """The displacement alone, by parameter."""
        return {name: state.arrays[name] for name in self._names}

    def loaded(self, payload: Payload) -> Classifier:
        """A network of the same form that holds the displacement of a message; 0 where it says nothing."""
        network = self.network()
        own = parameters_of(network, self._names)
        with torch.no_grad():
            for value in own.values():
                value.zero_()
        load(network, {name: value for name, value in tensors(payload).items() if name in own})
        return network

    def loss(self, network: Classifier, client: Client, place: Place, message: Payload) -> Loss:
        return task_loss(Displaced(self._start, self._own(network), linear=self.config.linear), place.task)

    def epochs(self, place: Place, message: Payload) -> int:
        if place.phase.name == REMOVAL.name:
            return int(message.meta["epochs"])  # type: ignore[arg-type]
        return super().epochs(place, message)

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if place.phase.name == CONTROL.name:
            return self._count(client, place, message)
        return super().client(client, place, message)

    def _count(self, client: Client, place: Place, message: Payload) -> Payload:
        """A remaining client's vote: right answers among its samples at every scale."""
        right = []
        for alpha in message.arrays[ALPHAS]:
            vector = {name: message.arrays[VECTOR + name] for name in self._names}
            predict = self.predictor(Payload(subtracted(self.tau(message), vector, float(alpha))), place.task)
            with torch.no_grad():
                right.append(
                    sum(
                        int((predict(batch.x)[:, : place.task.classes.stop].argmax(dim=1).cpu() == batch.y).sum())
                        for batch in batches(client.data, EVALUATION_BATCH)
                    )
                )
        return Payload({RIGHT: np.array(right, dtype=np.int64)}, {"n": len(client.data)})

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        return [RIGHT] if place.phase.name == CONTROL.name else super().expected(state, place)

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        if place.phase.name != CONTROL.name:
            return super().objection(state, place, reply)
        reason = misfit(reply, {RIGHT: ((len(SCALES),), "int64")})
        if not reason and not ((reply.arrays[RIGHT] >= 0) & (reply.arrays[RIGHT] <= reply.meta["n"])).all():
            reason = f"{RIGHT} holds numbers outside 0 to n"
        return reason

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        found = dict(super().aggregate(state, place, replies).arrays)
        found[ENTERED] = state.arrays[ENTERED].copy()
        for reply, share in zip(replies, self.weights(replies), strict=True):
            found[ENTERED][reply.client] += share
            for name in self._names if self.config.ledger else ():
                entry = f"{LEDGER}{reply.client}.{name}"
                before = state.arrays.get(entry, np.zeros_like(state.arrays[name]))
                parts = [before, reply.payload.arrays[name], state.arrays[name]]
                found[entry] = weighted_sum(parts, [1.0, share, -share])
        return Payload(found, state.meta)

    def share(self, state: Payload, client: int) -> float:
        """p_u, the share with which a client entered tau, over all rounds; 0 if it never did."""
        entered = state.arrays[ENTERED]
        return float(entered[client] / entered.sum()) if entered[client] > 0 else 0.0

    def contribution(self, state: Payload, client: int) -> Store:
        """What a client contributed to tau, by the ledger."""
        none = {name: np.zeros_like(array) for name, array in self.tau(state).items()}
        return {name: state.arrays.get(f"{LEDGER}{client}.{name}", zero) for name, zero in none.items()}

    def without(self, state: Payload, clients: Sequence[int], vector: Store) -> Payload:
        """The server with tau - vector and nothing that it kept of these clients."""
        own = tuple(f"{LEDGER}{client}." for client in clients)
        kept = {name: array for name, array in state.arrays.items() if not name.startswith(own)}
        entered = state.arrays[ENTERED].copy()
        entered[list(clients)] = 0
        return Payload({**kept, **subtracted(self.tau(state), vector, 1.0), ENTERED: entered}, state.meta)

    def folded(self, state: Payload, task: Task) -> Classifier | None:
        # Scores are linear in the head, so that its expansion is the network itself.
        if self.config.rank or (self.config.linear and self.config.train == "all"):
            return None
        return moved(self.network(), tensors(Payload(self.tau(state))))

    def predictor(self, state: Payload, task: Task) -> Predictor:
        tau = {name: value.to(self.problem.config.device) for name, value in tensors(Payload(self.tau(state))).items()}
        return displaced_predictor(Displaced(self._start, tau, linear=self.config.linear), self.problem.config.device)


def subtracted(tau: Store, vector: Store, alpha: float) -> Store:
    """tau - alpha vector, by parameter."""
    return {name: weighted_sum([array, vector[name]], [1.0, -alpha]) for name, array in tau.items()}


@torch.no_grad()
def moved(network: Classifier, tau: Mapping[str, Tensor]) -> Classifier:
    """The network with tau added to its parameters, in place."""
    for name, value in parameters_of(network, list(tau)).items():
        value.add_(tau[name].to(value))
    return network


def start_network(problem: Problem, rank: int, head_std: float) -> Classifier:
    """The network of a problem with the head, and with ``rank`` > 0 the frozen LoRA factors, that the seed gives."""
    network = problem.network()
    generator = torch_stream(problem.config.seed, "tangent start", 0)
    drawn = {"head.weight": torch.randn(network.head.weight.shape, generator=generator) * head_std}
    if rank:
        # The factors are overwritten; drawing their start must not touch anybody else's random numbers.
        with torch.random.fork_rng(devices=[]):
            with_lora(network, rank, problem.source.lora_places)
        for name, value in network.named_parameters():
            if name.endswith(FACTOR_A):
                drawn[name] = torch.randn(value.shape, generator=generator) / value.shape[1] ** 0.5
    load(network, drawn)
    return network.to(problem.config.device)


def trained_names(network: Classifier, rank: int, train: str) -> list[str]:
    """Names of the parameters that move."""
    if train == "head":
        return network.head_names()
    own = network.backbone_names()
    return network.head_names() + ([name for name in own if name.endswith(FACTOR_B)] if rank else own)


def displaced_predictor(network: Displaced, device: torch.device | str) -> Predictor:
    """Scores [B, C] without gradients."""

    def predict(x: Tensor) -> Tensor:
        # Forward-mode derivatives cannot be taken of inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            found: Tensor = network(x.to(device))
        return found

    return predict
