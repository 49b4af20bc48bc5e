"""A federation that is over in a second: three clients, two tasks of digits."""

from __future__ import annotations

from typing import Any

from neurocl.federated.catalog import method_for, problem_for
from neurocl.federated.config import FederatedConfig
from neurocl.federated.driver import FederatedRun
from neurocl.federated.exchange import Fault, SequentialExchange, Stores
from neurocl.federated.partition import PartitionConfig


def config(**changes: Any) -> FederatedConfig:
    """Two tasks of two digits, two rounds of one epoch."""
    small: dict[str, Any] = {
        "classes_per_task": (2, 2),
        "partition": PartitionConfig(num_clients=3, beta=1.0),
        "rounds": 2,
        "local_epochs": 1,
    }
    return FederatedConfig(**(small | changes))


def in_memory(own: FederatedConfig, *faults: Fault) -> tuple[FederatedRun, list[dict[str, Any]]]:
    """A run that keeps nothing on disk, and the list that its log goes to."""
    problem = problem_for(own)
    method = method_for(problem)
    stores, log = Stores(None), []
    exchange = SequentialExchange(problem, method, stores, faults)
    return FederatedRun(problem, method, exchange, stores, say=log.append), log
