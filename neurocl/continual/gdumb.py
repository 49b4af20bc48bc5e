"""GDumb: keep a class-balanced memory, ignore the stream otherwise, and train from scratch on the memory.

Reference: Prabhu et al., "GDumb: a simple approach that questions our progress in continual learning", 2020.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.method import Batch, Method, MethodConfig, Setting
from neurocl.continual.scenario import Task
from neurocl.devices import generator_for

FIT_STREAM = 4


class GdumbConfig(MethodConfig):
    """Hyper-parameters of GDumb."""

    policy: Literal["greedy", "reservoir"] = Field("greedy", description="greedy balancing (paper) or plain reservoir")
    fit_epochs: int = Field(256, ge=1, description="epochs of training on the memory")
    fit_after: Literal["every", "last"] = Field(
        "every", description="train after every task or after the last one only"
    )
    max_lr: float = Field(0.05, gt=0, description="of the cosine with warm restarts")
    min_lr: float = Field(5e-4, ge=0, description="where each cosine ends")
    cutmix: float = Field(0.5, ge=0, le=1, description="probability that a batch is cut-mixed (pictures only)")


def warm_restart_rate(epoch: int, max_lr: float, min_lr: float) -> float:
    """Learning rate: 0.1 max_lr, then max_lr, then cosine annealing with periods 1, 2, 4, ... epochs."""
    if epoch == 0:
        return 0.1 * max_lr
    if epoch == 1:
        return max_lr
    period, position = 1, epoch - 1
    while position >= period:
        position -= period
        period *= 2
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * position / period))


class Gdumb(Method):
    """No gradient step on the stream; ``end_task`` trains a fresh copy of the initial network on the memory."""

    Config: ClassVar[type[MethodConfig]] = GdumbConfig
    stream_epochs = 1  # a second pass would fill the memory with duplicates

    def __init__(self, network: nn.Module, setting: Setting, config: GdumbConfig) -> None:
        super().__init__(network, setting, config)
        self.options = config
        self.fresh = copy.deepcopy(network).requires_grad_(False)
        self.memory = self.make_memory(policy=config.policy)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def after_step(self, batch: Batch) -> None:
        self.memory.add(image=batch.raw, label=batch.y)

    def end_task(self, task: Task) -> None:
        last = task.index + 1 == len(self.setting.task_sizes)
        if self.options.fit_after == "every" or last:
            self._fit(generator_for(self.setting.seed, FIT_STREAM, task.index))

    def _fit(self, generator: torch.Generator) -> None:
        self.network.load_state_dict(self.fresh.state_dict())
        self.network.train()
        optimizer = torch.optim.SGD(self.network.parameters(), lr=self.options.max_lr)
        images, labels = self.memory.field("image"), self.memory.field("label")
        for epoch in range(self.options.fit_epochs):
            for group in optimizer.param_groups:
                group["lr"] = warm_restart_rate(epoch, self.options.max_lr, self.options.min_lr)
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            for chosen in order.split(self.setting.batch_size):
                x, y = self.augmented(images[chosen]), labels[chosen]
                loss = self._loss(x, y, generator)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def _loss(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy, of a cut-mixed batch with the configured probability (Yun et al., 2019)."""
        if x.ndim != 4 or float(torch.rand((), generator=generator)) >= self.options.cutmix:
            return self.classification_loss(self.network(x), y)
        height, width = x.shape[-2:]
        share = float(torch.rand((), generator=generator))
        side = math.sqrt(1 - share)
        row = int(torch.randint(height, (), generator=generator))
        column = int(torch.randint(width, (), generator=generator))
        half_h, half_w = int(height * side) // 2, int(width * side) // 2
        rows = slice(max(row - half_h, 0), min(row + half_h, height))
        columns = slice(max(column - half_w, 0), min(column + half_w, width))
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        mixed = x.clone()
        mixed[..., rows, columns] = x[partner][..., rows, columns]
        kept = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        logits = self.network(mixed)
        return kept * self.classification_loss(logits, y) + (1 - kept) * self.classification_loss(logits, y[partner])
