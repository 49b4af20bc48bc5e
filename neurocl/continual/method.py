"""The contract of a continual-learning method, and what it is told about the stream.

A method owns the network and the memory. The loop calls, for every task, ``begin_task``; for every
batch ``loss`` (whose named terms it adds up), an optimiser step and ``after_step``; then ``end_task``.
Everything that a method must remember is in its ``state_dict()``, or a run could not be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from neurocl.config import Config
from neurocl.continual.losses import cross_entropy, time_mean
from neurocl.continual.memory import Field, Memory
from neurocl.devices import generator_for

if TYPE_CHECKING:
    from neurocl.continual.scenario import Task
    from neurocl.data.augment import Augment


MEMORY_STREAM = 5


class MethodConfig(Config):
    """Hyper-parameters of a method without any."""


@dataclass(frozen=True)
class Batch:
    """One batch of the current task.

    Attributes:
        x: augmented, normalised input [B, C, H, W] (event frames [B, T, C, H, W]).
        y: class ids [B].
        raw: the items as stored, uint8, not augmented; what a memory keeps.
        index: position of each item within ``task.images`` [B].
    """

    x: Tensor
    y: Tensor
    raw: Tensor
    index: Tensor


@dataclass(frozen=True)
class Setting:
    """What a method is told about the stream before it begins.

    Attributes:
        task_sizes: classes per task.
        input_shape: of one item, (C, H, W) or (T, C, H, W).
        augment: turns raw items into network input; ``augment.normalise`` does so without randomness.
        buffer_size, batch_size, replay_batch, epochs: as configured.
        per_step_loss: classification losses at every time step (spiking networks).
        make_optimizer: builds the configured optimiser over the given parameters.
        augment_generator: the random stream of all augmentation in this run.
        seed: of the run; a method derives its own generators from it.
    """

    task_sizes: tuple[int, ...]
    input_shape: tuple[int, ...]
    augment: Augment
    buffer_size: int
    batch_size: int
    replay_batch: int
    epochs: int
    per_step_loss: bool
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    augment_generator: torch.Generator
    seed: int

    @property
    def num_classes(self) -> int:
        return sum(self.task_sizes)


class Method(nn.Module):
    """Base class: plain training, no memory. Subclasses set ``Config`` and override what differs.

    Args:
        network: [B, ...] -> logits [B, K]; spiking networks give [T, B, K] in training mode.
        setting: the stream.
        config: an instance of ``Config``.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    #: passes over each task's stream where the method fixes them; None for the configured number
    stream_epochs: ClassVar[int | None] = None

    def __init__(self, network: nn.Module, setting: Setting, config: MethodConfig) -> None:
        super().__init__()
        self.network = network
        self.setting = setting
        self.config = config
        self.task_index = 0

    def make_memory(
        self, fields: Mapping[str, Field] | None = None, *, stream: int = 0, policy: str = "reservoir"
    ) -> Memory:
        """A memory of raw items and labels plus ``fields``; each ``stream`` number is a random stream of its own."""
        described: dict[str, Field] = {
            "image": (self.setting.input_shape, torch.uint8),
            "label": ((), torch.int64),
            **(fields or {}),
        }
        seed = generator_for(self.setting.seed, MEMORY_STREAM, stream).initial_seed()
        return Memory(self.setting.buffer_size, described, seed=seed, policy=policy)

    def augmented(self, raw: Tensor) -> Tensor:
        """Replayed raw items as network input, augmented anew at every draw."""
        return self.setting.augment(raw, self.setting.augment_generator)

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over all K classes."""
        return cross_entropy(logits, labels, per_step=self.setting.per_step_loss)

    def begin_task(self, task: Task) -> None:
        """Called before the first batch of ``task``."""
        self.task_index = task.index

    def training_data(self, task: Task) -> tuple[Tensor, Tensor]:
        """The items and labels of the task's epochs; iCaRL, for one, adds its exemplars.

        Called after ``begin_task`` and again when a run resumes inside the task, so this is also the place to
        derive what is not worth keeping as state.
        """
        return task.images, task.labels

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named terms whose sum is minimised; an empty dict means no optimiser step."""
        return {"ce": self.classification_loss(self.network(batch.x), batch.y)}

    def after_step(self, batch: Batch) -> None:
        """Called after the optimiser step: fill the memory, update statistics."""

    def end_task(self, task: Task) -> None:
        """Called after the last batch of ``task``, before evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] for evaluation (the module is in evaluation mode)."""
        return time_mean(self.network(x))
