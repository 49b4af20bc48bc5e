"""The contract of a federated method: pure functions of states and messages, run by any runtime.

For every task the driver goes through the method's phases, and in every round of a phase through ``message`` (server),
``client`` (each client, on its own data) and ``aggregate`` (server). A state, a message and a reply are all a
:class:`~neurocl.federated.payload.Payload`, named arrays and plain values, so they can be stored and sent; nothing
else survives a call. Replies come sorted by client, and aggregation is a function of the state and the replies alone:
that is what makes runs resumable and all runtimes equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.config import Config
from neurocl.errors import RunError, UserError
from neurocl.federated.payload import Payload
from neurocl.federated.randomness import stream, torch_stream

if TYPE_CHECKING:
    from neurocl.federated.config import FederatedConfig
    from neurocl.federated.network import Classifier

Store = dict[str, NDArray[Any]]
Predictor = Callable[[Tensor], Tensor]


class RoundLost(RunError):
    """Replies came that are of no use together: the round counts for nothing, as if too few had come."""


class MethodConfig(Config):
    """Hyper-parameters of a method without any."""


@dataclass(frozen=True)
class Task:
    """One task of the stream.

    Attributes:
        index: from 0.
        classes: consecutive class numbers.
    """

    index: int
    classes: range


@dataclass(frozen=True)
class Phase:
    """A part of a task in which the server and its clients exchange ``rounds`` messages.

    Attributes:
        name: what the method calls it.
        rounds: how many.
        train: clients train; else they only measure, and everybody takes part whatever the participation.
    """

    name: str
    rounds: int = 1
    train: bool = True


@dataclass(frozen=True)
class Place:
    """Where a run is: task, phase, round."""

    task: Task
    phase: Phase
    round: int

    @property
    def key(self) -> tuple[str, int, int]:
        """For random streams and stored replies."""
        return self.phase.name, self.task.index, self.round


@dataclass(frozen=True)
class Samples:
    """Pictures, tokens or features with labels, ready for the network: x float32 [N, ...], y int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Client:
    """What a client's code may use.

    Attributes:
        number: from 0.
        data: its training samples of the current task.
        seed: of the run.
        store: arrays that it keeps between rounds; what it puts in is kept only if its reply arrives.
        device: where to compute.
    """

    number: int
    data: Samples
    seed: int
    store: Store = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def generator(self, place: Place, label: str = "") -> torch.Generator:
        """Random numbers of this client at this place, the same in every runtime."""
        phase, task, number = place.key
        return torch_stream(self.seed, f"client {phase} {label}", task, number, self.number)


@dataclass(frozen=True)
class Reply:
    """What a client sent back."""

    client: int
    payload: Payload


class FederatedMethod(ABC):
    """Base class. Hyper-parameters are ``Config``; an instance keeps no state between calls.

    Args:
        problem: what everybody knows before the beginning, see :mod:`neurocl.federated.problem`.
        config: an instance of ``Config``.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    #: the server needs nothing of the clients but sums, and ``summed``, ``summand`` and ``of_sum`` say which: secure
    #: summation is possible. A class that changes what is sent or made of it has to say it again.
    sum_only: ClassVar[bool] = False
    #: what the server learns of a client, one sentence for the documentation
    reveals: ClassVar[str]
    #: every client has a model of its own: ``predictor`` is given what the client stored, as a payload, for a state
    personal: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if "sum_only" not in own and ("of_sum" in own or own.keys() & {"client", "reply", "weights", "aggregate"}):
            cls.sum_only = "of_sum" in own

    def __init__(self, problem: Any, config: MethodConfig) -> None:
        self.problem = problem
        self.config = config

    @classmethod
    def arranged(cls, config: FederatedConfig) -> FederatedConfig:
        """The configuration that the method turns the user's into, before data are cut and dealt."""
        return config

    def phases(self, task: Task) -> Sequence[Phase]:
        """The phases of a task, in order."""
        return (Phase("round", self.problem.config.rounds),)

    @abstractmethod
    def initial_state(self) -> Payload:
        """The server before the first task."""

    def begin_task(self, state: Payload, task: Task) -> Payload:
        """The server when a task begins."""
        return state

    def coming(self, state: Payload, place: Place) -> list[int]:
        """The clients that are asked at a place, sorted: all of them, or the share that is drawn for training."""
        config, count = self.problem.config, self.problem.num_clients
        if not place.phase.train or config.participation >= 1:
            return list(range(count))
        number = place.round if config.participation_per == "round" else 0
        rng = stream(config.seed, "participation", place.task.index, number)
        chosen = rng.choice(count, size=max(1, round(config.participation * count)), replace=False)
        return sorted(int(client) for client in chosen)

    def quorum(self, state: Payload, place: Place) -> int:
        """Replies below which the server asks again, and in the end has lost the round."""
        wanted: int = self.problem.config.min_clients
        return wanted

    def closes(self, place: Place) -> bool:
        """Whether a round that came so far has not been lost; false where one of training takes several exchanges."""
        return True

    @abstractmethod
    def message(self, state: Payload, place: Place) -> Payload:
        """What the server sends to every client."""

    @abstractmethod
    def client(self, client: Client, place: Place, message: Payload) -> Payload:
        """What a client answers; meta ``n`` is the number of samples that stand behind it."""

    @abstractmethod
    def aggregate(self, state: Payload, place: Place, replies: Sequence[Reply]) -> Payload:
        """The server after the replies, at least one, sorted by client.

        Raises:
            RoundLost: nothing can be made of them.
        """

    def objection(self, state: Payload, place: Place, reply: Payload) -> str:
        """Why a reply cannot be aggregated, or nothing: by default arrays named like the state's must look like them.

        Whatever a client sends, ``aggregate`` must not fail: methods whose replies hold more check more.
        """
        for name, array in reply.arrays.items():
            if name in state.arrays and array.shape != state.arrays[name].shape:
                return f"{name} has shape {list(array.shape)}, expected {list(state.arrays[name].shape)}"
            if name in state.arrays and array.dtype != state.arrays[name].dtype:
                return f"{name} is {array.dtype}, expected {state.arrays[name].dtype}"
        missing = [name for name in self.expected(state, place) if name not in reply.arrays]
        return f"{missing[0]} is missing" if missing else ""

    def expected(self, state: Payload, place: Place) -> Sequence[str]:
        """Names of arrays without which a reply is of no use."""
        return ()

    def summed(self, state: Payload, place: Place) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what clients contribute to the server's sums, with ``n`` of shape () among them.

        Args:
            state: of the server, or its message.
            place: where.
        """
        raise NotImplementedError

    def summand(self, place: Place, reply: Payload) -> Store:
        """What a reply contributes, under the names of ``summed``; one without samples contributes zeros."""
        raise NotImplementedError

    def of_sum(self, state: Payload, place: Place, total: Store) -> Payload:
        """The reply that does the same to the server alone as all those do together that add up to ``total``."""
        raise NotImplementedError

    def end_task(self, state: Payload, task: Task) -> Payload:
        """The server when a task is over."""
        return state

    @abstractmethod
    def predictor(self, state: Payload, task: Task) -> Predictor:
        """The server's model: from samples [B, ...] to scores of all classes [B, C]."""

    def folded(self, state: Payload, task: Task) -> Classifier | None:
        """The server's model as a plain network with the scores of ``predictor``; None if it is not."""
        return None

    def for_prediction(self, state: Payload) -> Payload:
        """What ``predictor`` needs of a state, for whoever takes the model away; it should tell of no client."""
        return state

    def forget(self, state: Payload, client: int) -> Payload:
        """The server without everything it knows of a client, exactly.

        Raises:
            UserError: the method cannot do that.
        """
        if self.personal:
            raise UserError("every client has a model of its own, and the others' know nothing of it")
        raise UserError(f"{type(self).__name__} keeps only sums over clients and cannot take one out exactly")

    def server_generator(self, place: Place, label: str = "") -> torch.Generator:
        """Random numbers of the server at this place."""
        phase, task, number = place.key
        return torch_stream(self.problem.config.seed, f"server {phase} {label}", task, number)

    def server_rng(self, label: str, *numbers: int) -> np.random.Generator:
        """Random numbers of the server."""
        return stream(self.problem.config.seed, f"server {label}", *numbers)


def shares(replies: Sequence[Reply]) -> NDArray[np.float64]:
    """Share of the samples behind each reply, [K]; equal ones if nobody has any."""
    counts = np.array([float(reply.payload.meta["n"]) for reply in replies])  # type: ignore[arg-type]
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(counts), 1 / len(counts))


def weighted_sum(arrays: Sequence[NDArray[Any]], weights: Sequence[float] | NDArray[np.float64]) -> NDArray[Any]:
    """sum_k w_k x_k in float64, in the order given; the dtype of the first array."""
    total = np.zeros(arrays[0].shape, dtype=np.float64)
    for array, weight in zip(arrays, weights, strict=True):
        total += np.multiply(array, float(weight), dtype=np.float64)
    return total.astype(arrays[0].dtype)


def mean_arrays(replies: Sequence[Reply], names: Sequence[str], weights: NDArray[np.float64]) -> Store:
    """The weighted mean over replies of the named arrays."""
    return {name: weighted_sum([reply.payload.arrays[name] for reply in replies], weights) for name in names}
