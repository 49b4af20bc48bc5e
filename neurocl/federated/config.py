"""How a federated run is set up: data, partition, rounds, local training; one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from neurocl.config import Config
from neurocl.federated.partition import PartitionConfig


class PrivacyConfig(Config):
    """Client-level differential privacy.

    Attributes:
        clip: C, the largest norm of a client's change in a round.
        noise: z, the standard deviation of the noise on the sum, as a multiple of ``clip``.
        delta: of the guarantee (epsilon, delta).
        where: ``server`` adds the noise once, to the sum, and has to be trusted with the replies; with ``client`` every
            reply carries all of it when it is sent, so that no reply tells much, and the sum has sqrt(m) times as much.
        seeded: draw the noise from the run's seed, to repeat a run to the bit. Whoever knows the seed can take that
            noise away again; otherwise it comes from a secret of the server or the client.
    """

    clip: Annotated[float, Field(gt=0)] = 1.0
    noise: Annotated[float, Field(gt=0)] = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    where: Literal["server", "client"] = "server"
    seeded: bool = False


class SecureSumConfig(Config):
    """Secure summation: the server learns the sum of what its clients contribute, and nothing else of them.

    Attributes:
        threshold: share of the clients asked in a round, more than half, that must be left at its end, at least two;
            with fewer the round is lost.
        bits: after the binary point; sums are exact in steps of 2^-bits and must stay below 2^(62 - bits).
    """

    threshold: Annotated[float, Field(gt=0.5, le=1)] = 2 / 3
    bits: Annotated[int, Field(ge=8, le=48)] = 32


class FederatedConfig(Config):
    """A federated run.

    Attributes:
        dataset: a name of :data:`neurocl.federated.catalog.PROBLEMS`, or ``module:function`` of your own, which gets
            this configuration and returns a :class:`~neurocl.federated.problem.Source`.
        data_dir: where data are looked for first.
        backbone: ``perceptron``, ``vit``, or for pictures a folder of transformers; None for the data set's usual one.
        method: a name of :data:`neurocl.federated.catalog.FEDERATED`.
        options: overrides of the method's own hyper-parameters.
        classes_per_task: how the classes are cut into tasks; one number for all, or one per task; 0 for one task.
        partition: how the samples of a task are dealt to the clients.
        participation: share of the clients that take part, at least one.
        participation_per: drawn for every round, or once per task as the published code does.
        privacy: bounds and noise on what clients send, see :class:`PrivacyConfig`; None for none.
        secure_sum: the server is shown nothing but sums over its clients, see :class:`SecureSumConfig`; None to show it
            every reply.
        rounds: R, per task.
        local_epochs: E, per round.
        batch_size, lr, weight_decay, optimizer, clip: of the clients' training; ``lr`` None takes the method's own.
        min_clients: replies below which those who have not answered are asked again.
        max_repeats: how often it is.
        timeout: seconds that a client may take; None for no limit.
        workers: processes that run clients side by side; 0 runs them in this process, one after the other.
        seed: of everything.
        device, threads: of the computation.
    """

    dataset: str = "digits"
    data_dir: Path | None = None
    backbone: str | None = None
    method: str = "fedavg"
    options: dict[str, Any] = Field(default_factory=dict)
    classes_per_task: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    partition: PartitionConfig = PartitionConfig()
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    participation_per: Literal["round", "task"] = "round"
    privacy: PrivacyConfig | None = None
    secure_sum: SecureSumConfig | None = None
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
