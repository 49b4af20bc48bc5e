"""What everybody in a federation knows before it begins: tasks, the network, and where each sample lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.errors import UserError
from neurocl.federated.config import FederatedConfig
from neurocl.federated.method import Samples, Task
from neurocl.federated.network import Classifier
from neurocl.federated.partition import split_task, test_shares
from neurocl.federated.randomness import stream

Labels = NDArray[np.int64]

#: linear layers of a Vision Transformer that get LoRA: not the embedding of patches
VIT_PLACES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Source:
    """A data set with a network to start from.

    Attributes:
        name: what the user types.
        train, test: samples ready for the network, labels 0 to C - 1.
        class_names: C names.
        build: makes the network with the weights that everybody starts from; always the same.
        lr: a learning rate that suits full fine-tuning of this network.
        classes_per_task: where the run does not say.
        lora_places: parts of the names of the layers that adapters go to; empty for all linear layers.
        blueprint: from which :func:`~neurocl.federated.blueprint.network_of` makes the network without data; empty
            where only ``build`` can.
        inputs: what a sample is, for who has only the model.
    """

    name: str
    train: Samples
    test: Samples
    class_names: tuple[str, ...]
    build: Callable[[], Classifier]
    lr: float = 1e-3
    classes_per_task: int = 2
    lora_places: tuple[str, ...] = ()
    blueprint: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = ""


@dataclass(frozen=True)
class Problem:
    """A source cut into tasks and dealt to clients.

    Args:
        config: of the run.
        source: the data.

    Raises:
        UserError: tasks that do not fit the classes, or a partition that is impossible.
    """

    config: FederatedConfig
    source: Source
    tasks: tuple[Task, ...] = field(init=False)

    def __post_init__(self) -> None:
        sizes = task_sizes(self.config.classes_per_task, self.source.classes_per_task, self.num_classes)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        tasks = tuple(
            Task(index, range(int(start), int(start) + size))
            for index, (start, size) in enumerate(zip(starts, sizes, strict=False))
        )
        object.__setattr__(self, "tasks", tasks)

    @property
    def num_classes(self) -> int:
        """C, over all tasks."""
        return len(self.source.class_names)

    @property
    def num_clients(self) -> int:
        """K."""
        return self.config.partition.num_clients

    @property
    def lr(self) -> float:
        """Of the clients' training, where the method has no wish of its own."""
        return self.config.lr if self.config.lr is not None else self.source.lr

    def network(self) -> Classifier:
        """The network that everybody starts from."""
        return self.source.build().to(self.config.device)

    @cached_property
    def num_features(self) -> int:
        """d, what the head sees."""
        return int(self.network().head.in_features)

    @cached_property
    def owners(self) -> tuple[tuple[Tensor, Labels], ...]:
        """For every task the rows of its training samples, and the client who owns each."""
        labels = self.source.train.y.numpy()
        found = []
        for task in self.tasks:
            rows = np.flatnonzero((labels >= task.classes.start) & (labels < task.classes.stop))
            found.append((torch.from_numpy(rows), split_task(self.config.partition, labels[rows], task.index)))
        return tuple(found)

    @cached_property
    def _train_rows(self) -> tuple[tuple[Tensor, ...], ...]:
        """For every task the rows of each client: found once for all, or a thousand clients would each search all."""
        return tuple(_by_owner(rows, owner, self.num_clients) for rows, owner in self.owners)

    def train_samples(self, client: int, task: Task) -> Samples:
        """What a client has of a task."""
        own = self._train_rows[task.index][client]
        return Samples(self.source.train.x[own], self.source.train.y[own])

    @cached_property
    def _tests(self) -> tuple[Samples, ...]:
        test, found = self.source.test, []
        for task in self.tasks:
            chosen = (test.y >= task.classes.start) & (test.y < task.classes.stop)
            found.append(Samples(test.x[chosen], test.y[chosen]))
        return tuple(found)

    def test_samples(self, task: Task) -> Samples:
        """The test samples of a task, of all clients together."""
        return self._tests[task.index]

    @cached_property
    def _test_rows(self) -> tuple[tuple[Tensor, ...], ...]:
        found = []
        for task in self.tasks:
            rows, owner = self.owners[task.index]
            labels, test = self.source.train.y[rows].numpy(), self.test_samples(task).y.numpy()
            rng = stream(self.config.partition.seed, "test split", task.index)
            dealt = test_shares(labels, owner, test, self.num_clients, rng)
            found.append(_by_owner(torch.arange(len(test)), dealt, self.num_clients))
        return tuple(found)

    def local_test_samples(self, client: int, task: Task) -> Samples:
        """A client's own share of the test samples of a task, in the proportions of its training samples."""
        samples, own = self.test_samples(task), self._test_rows[task.index][client]
        return Samples(samples.x[own], samples.y[own])


def _by_owner(rows: Tensor, owner: Labels, num_clients: int) -> tuple[Tensor, ...]:
    """The rows of every client, in their order; nobody's (owner -1) are left out."""
    order = np.argsort(owner, kind="stable")
    ends = np.searchsorted(owner[order], np.arange(num_clients + 1))
    return tuple(rows[torch.from_numpy(order[ends[k] : ends[k + 1]])] for k in range(num_clients))


def choose(config: FederatedConfig, *backbones: str) -> str:
    """The backbone that the run asks for, the first one if it asks for none.

    Raises:
        UserError: one that this data set does not have.
    """
    asked = config.backbone or backbones[0]
    if asked not in backbones:
        raise UserError(f"{config.dataset} has no backbone {asked!r} (choose from {', '.join(backbones)})")
    return asked


def task_sizes(asked: int | tuple[int, ...] | None, usual: int, num_classes: int) -> list[int]:
    """Classes of every task; a single number cuts all classes into tasks of that size, the last may be smaller.

    Raises:
        UserError: more classes than there are.
    """
    if isinstance(asked, tuple):
        if sum(asked) > num_classes:
            raise UserError(f"classes_per_task adds up to {sum(asked)}, the data set has {num_classes} classes")
        return list(asked)
    size = usual if asked is None else asked
    if size == 0:
        return [num_classes]
    if size > num_classes:
        raise UserError(f"classes_per_task is {size}, the data set has {num_classes} classes")
    whole, rest = divmod(num_classes, size)
    return [size] * whole + ([rest] if rest else [])
