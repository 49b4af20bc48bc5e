"""Ridge regression in tangent features: squared loss on a first-order expansion, solved from sums that forget exactly.

``K`` clients, ``N`` samples, ``C`` classes, ``P`` parameters that move. J [N C, P] is the derivative of all scores f0
at the start; with H = sum J^T J and m = sum J^T (y - f0), y one-hot, tau = (H + ridge I)^-1 m. Of H, which is
symmetric, the upper triangle travels and is kept, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from neurocl.errors import UserError
from neurocl.federated.local_training import batches
from neurocl.federated.lora import misfit
from neurocl.federated.method import (
    Client,
    FederatedMethod,
    MethodConfig,
    Phase,
    Place,
    Predictor,
    Reply,
    Samples,
    Store,
    Task,
)
from neurocl.federated.network import Classifier
from neurocl.federated.payload import Payload, arrays_of, tensors
from neurocl.federated.tangent import Displaced, displaced_predictor, moved, start_network, trained_names
from neurocl.merging.linear_algebra import solve_psd

GRAM, MOMENTS, TAU = "gram", "moments", "tau."
EVERYBODY = "all"

# P x P numbers travel, are kept for every client, and are solved with.
LARGEST_P = 10_000
JACOBIAN_BATCH = 32


class TangentRidgeConfig(MethodConfig):
    """Of tangent-ridge.

    Attributes:
        ridge: added to the diagonal of the second moments.
        train: the head and B of frozen-down LoRA W + B A with A drawn once, or the head alone.
        rank: of that LoRA.
        head_std: of the head's first weights, drawn from the run's seed.
        forgettable: the server keeps every client's second moments, P x P numbers, so that it can forget one; else only
            their sum.
    """

    ridge: Annotated[float, Field(gt=0)] = 1.0
    train: Literal["all", "head"] = "all"
    rank: Annotated[int, Field(ge=1)] = 1
    head_std: Annotated[float, Field(ge=0)] = 0.05
    forgettable: bool = True


class TangentRidge(FederatedMethod):
    """Squared loss on the first-order expansion of a network: one message for each task, no training.

    Every output counts for every sample, those of later classes with 0, so that the order of tasks does not matter.
    With the head alone this is a ridge regression on features. The design is ours, see
    :class:`~neurocl.federated.tangent.Tangent`.
    """

    Config = TangentRidgeConfig
    config: TangentRidgeConfig
    reveals = "the second moments of a client's gradients of all scores, and their products with its labels"

    @cached_property
    def _start(self) -> Classifier:
        rank = self.config.rank if self.config.train == "all" else 0
        return start_network(self.problem, rank, self.config.head_std).requires_grad_(False).eval()

    @cached_property
    def _names(self) -> list[str]:
        return trained_names(self._start, self.config.rank, self.config.train)

    @cached_property
    def _size(self) -> int:
        own = dict(self._start.named_parameters())
        return sum(own[name].numel() for name in self._names)

    def phases(self, task: Task) -> Sequence[Phase]:
        return (Phase("statistics", 1, train=False),)

    def initial_state(self) -> Payload:
        self._check_size()
        return Payload()

    def _check_size(self) -> None:
        if self._size > LARGEST_P:
            raise UserError(
                f"tangent-ridge solves for {self._size} parameters, at most {LARGEST_P} are allowed; choose a smaller "
                "rank or train to head"
            )

    def message(self, state: Payload, place: Place) -> Payload:
        # Everybody has the start.
        return Payload()

    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        if not len(client.data):
            return Payload(meta={"n": 0})
        gram, moments = tangent_moments(self._start, self._names, client.data, client.device)
        return Payload({GRAM: upper(gram).float().numpy(), MOMENTS: moments.float().numpy()}, {"n": len(client.data)})

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        size = self._size
        reason = misfit(reply, {GRAM: ((size * (size + 1) // 2,), "float32"), MOMENTS: ((size,), "float32")})
        # A row of the triangle begins with its diagonal entry and is one shorter than the row before.
        if not reason and reply.arrays[GRAM][np.arange(size) * (2 * size + 1 - np.arange(size)) // 2].min() < 0:
            reason = f"{GRAM} is no Gram matrix: its diagonal has negative entries"
        return reason

    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        arrays = dict(state.arrays)
        for reply in replies:
            owner = str(reply.client) if self.config.forgettable else EVERYBODY
            for kind in (GRAM, MOMENTS):
                name, told = f"{kind}.{owner}", reply.payload.arrays[kind]
                arrays[name] = arrays.get(name, np.zeros(told.shape)) + told
        return Payload(arrays, state.meta)

    def summed(self, state: Payload, place: Place) -> dict[str, tuple[int, ...]]:
        return {"n": (), GRAM: (self._size * (self._size + 1) // 2,), MOMENTS: (self._size,)}

    def summand(self, place: Place, reply: Payload) -> Store:
        return {"n": np.array(reply.meta["n"]), **reply.arrays}

    def of_sum(self, state: Payload, place: Place, total: Store) -> Payload:
        return Payload({name: total[name].astype(np.float32) for name in (GRAM, MOMENTS)}, {"n": int(total["n"])})

    def forget(self, state: Payload, client: int) -> Payload:
        if not self.config.forgettable:
            raise UserError(
                "tangent-ridge with forgettable false keeps only sums over clients; only true can forget one"
            )
        gone = {f"{kind}.{client}" for kind in (GRAM, MOMENTS)}
        return Payload({name: array for name, array in state.arrays.items() if name not in gone}, state.meta)

    def displacement(self, state: Payload) -> dict[str, Tensor]:
        """tau by parameter, in the network's own type."""
        ready = tensors(state, TAU)
        if ready:
            return ready
        self._check_size()  # a model that was taken away may say anything
        size = self._size
        triangle, moments = np.zeros(size * (size + 1) // 2), np.zeros(size)
        for name, array in state.arrays.items():
            total = triangle if name.startswith(GRAM) else moments
            total += array
        gram = symmetric(torch.from_numpy(triangle), size)
        tau = ridge_displacement(gram, torch.from_numpy(moments), self.config.ridge)
        own = dict(self._start.named_parameters())
        parts = tau.split([own[name].numel() for name in self._names])
        return {name: part.view_as(own[name]).to(own[name]) for name, part in zip(self._names, parts, strict=True)}

    def folded(self, state: Payload, task: Task) -> Classifier | None:
        if self.config.train == "all":
            return None
        return moved(start_network(self.problem, 0, self.config.head_std), self.displacement(state))

    def for_prediction(self, state: Payload) -> Payload:
        return Payload(arrays_of(self.displacement(state), TAU))

    def predictor(self, state: Payload, task: Task) -> Predictor:
        return displaced_predictor(Displaced(self._start, self.displacement(state)), self.problem.config.device)


def tangent_moments(
    start: torch.nn.Module, names: Sequence[str], samples: Samples, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """H = sum J^T J, float64 [P, P], and m = sum J^T (y - f0), float64 [P], on the CPU.

    Args:
        start: the network at its start.
        names: parameters that move, in the order in which they are laid out, each row by row.
        samples: with labels below C.
        device: where the network is.
    """
    own = dict(start.named_parameters())
    values = {name: own[name].detach() for name in names}

    def scores(moving: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(start, moving, (x[None],))
        return found[0]

    derivative = vmap(jacrev(scores), in_dims=(None, 0))
    size = sum(value.numel() for value in values.values())
    gram, moments = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for batch in batches(samples, JACOBIAN_BATCH):
        x = batch.x.to(device)
        slopes = derivative(values, x)
        rows = torch.cat([slopes[name].flatten(2) for name in names], dim=2).flatten(0, 1).cpu().double()
        with torch.no_grad():
            first = start(x).cpu().double()
        missing = F.one_hot(batch.y, first.shape[1]) - first
        gram += rows.mT @ rows
        moments += rows.mT @ missing.flatten()
    return gram, moments


def upper(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix [P, P], row by row, [P (P + 1) / 2]."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix))
    return matrix[rows, columns]


def symmetric(triangle: Tensor, size: int) -> Tensor:
    """The matrix [P, P] of an upper triangle; the inverse of :func:`upper`."""
    rows, columns = torch.triu_indices(size, size)
    matrix = torch.zeros(size, size, dtype=triangle.dtype)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def ridge_displacement(gram: Tensor, moments: Tensor, ridge: float) -> Tensor:
    """tau = (H + ridge I)^-1 m, float64 [P]; the pseudo-inverse where rounding spoilt H.

    Args:
        gram: H [P, P].
        moments: m [P].
        ridge: absolute, above 0.
    """
    system = gram.clone()
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        return solve_psd(system, moments[:, None])[:, 0]
    return torch.cholesky_solve(moments[:, None], factor)[:, 0]
