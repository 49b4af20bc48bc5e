"""Small federations on the digits for the tests of methods with adapters, and replies that are made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import Fault, SequentialExchange, Stores, client_of
from neurocl.federated.fedavg import FedAvg
from neurocl.federated.method import Phase, Place, Reply, Task
from neurocl.federated.partition import PartitionConfig
from neurocl.federated.payload import Payload, num_bytes

CLIENTS = 5
# The digits' network: (outputs, inputs) of its adapted layers, features and classes.
LAYERS, FEATURES, CLASSES = {"backbone.fc1": (128, 64), "backbone.fc2": (128, 128)}, 128, 10
HEAD_FLOATS = CLASSES * FEATURES + CLASSES


def digits_method(name: str, options: Mapping[str, Any] | None = None, **config: Any) -> FedAvg:
    """A method on the digits, five clients, beta 0.5."""
    partition = PartitionConfig(num_clients=CLIENTS, beta=config.pop("beta", 0.5), seed=config.get("seed", 0))
    found = method_for(problem_for(FederatedConfig(method=name, options=options or {}, partition=partition, **config)))
    assert isinstance(found, FedAvg)
    return found


def run_of(method: FedAvg, faults: Sequence[Fault] = ()) -> FederatedRun:
    """A run in this process that is kept nowhere, ready to begin."""
    stores = Stores(None)
    return FederatedRun(method.problem, method, SequentialExchange(method.problem, method, stores, faults), stores)


def place(method: FedAvg, task: int = 0, phase: str = "round", number: int = 0) -> Place:
    """A place of the method's problem."""
    return Place(method.problem.tasks[task], Phase(phase, train=phase == "round"), number)


def replies_of(method: FedAvg, state: Payload, where: Place, clients: Sequence[int] = range(CLIENTS)) -> list[Reply]:
    """What clients answer at a place."""
    message = method.message(state, where)
    return [
        Reply(number, method.client(client_of(method.problem, number, where, {}), where, message)) for number in clients
    ]


def by_hand(arrays: Sequence[Mapping[str, Any]], counts: Sequence[int] | None = None) -> list[Reply]:
    """Replies with the given arrays."""
    counts = counts if counts is not None else [1] * len(arrays)
    return [
        Reply(number, Payload({name: np.asarray(value) for name, value in own.items()}, {"n": int(count)}))
        for number, (own, count) in enumerate(zip(arrays, counts, strict=True))
    ]


def at_task(classes: int, index: int = 0) -> Place:
    """A place in a task of that many classes from 0."""
    return Place(Task(index, range(classes)), Phase("round"), 0)


def floats(payload: Payload) -> float:
    """Bytes of a payload without its meta, in numbers of float32."""
    return (num_bytes(payload) - num_bytes(Payload(meta=payload.meta))) / 4
