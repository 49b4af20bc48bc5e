"""How a federated run is set up: data, partition, rounds, local training; one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from neurocl.config import Config
from neurocl.federated.partition import PartitionConfig


class FederatedConfig(Config):
    """A federated run.

    Attributes:
        dataset: a name of :data:`neurocl.federated.catalog.PROBLEMS`.
        data_dir: where data are looked for first.
        method: a name of :data:`neurocl.federated.catalog.FEDERATED`.
        options: overrides of the method's own hyper-parameters.
        classes_per_task: how the classes are cut into tasks; one number for all, or one per task; 0 for one task.
        partition: how the samples of a task are dealt to the clients.
        participation: share of the clients that take part, at least one.
        participation_per: drawn for every round, or once per task as the published code does.
        rounds: R, per task.
        local_epochs: E, per round.
        batch_size, lr, weight_decay, optimizer, clip: of the clients' training; ``lr`` None takes the method's own.
        min_clients: replies below which a round is repeated.
        max_repeats: how often it is.
        timeout: seconds that a client may take; None for no limit.
        workers: processes that run clients side by side; 0 runs them in this process, one after the other.
        seed: of everything.
        device, threads: of the computation.
    """

    dataset: str = "digits"
    data_dir: Path | None = None
    method: str = "fedavg"
    options: dict[str, Any] = Field(default_factory=dict)
    classes_per_task: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    partition: PartitionConfig = PartitionConfig()
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    participation_per: Literal["round", "task"] = "round"
    rounds: Annotated[int, Field(ge=1)] = 5
    local_epochs: Annotated[int, Field(ge=1)] = 5
    batch_size: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    clip: Annotated[float, Field(ge=0)] = 0.0
    min_clients: Annotated[int, Field(ge=1)] = 1
    max_repeats: Annotated[int, Field(ge=0)] = 2
    timeout: Annotated[float, Field(gt=0)] | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = 1
