"""Learning without forgetting: the previous network's answers to the new images are kept as soft targets.

Reference: Li and Hoiem, "Learning without forgetting", 2018. The old logits are computed on normalised,
un-augmented images (the released Mammoth code forgets to normalise them).
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.heads import linear_head
from neurocl.continual.losses import time_mean
from neurocl.continual.method import Batch, Method, MethodConfig, Setting
from neurocl.continual.scenario import Task
from neurocl.devices import generator_for

WARM_UP_STREAM = 3


class LwfConfig(MethodConfig):
    """Hyper-parameters of LwF."""

    alpha: float = Field(1.0, ge=0, description="weight of the distillation")
    temperature: float = Field(2.0, gt=0, description="softening of both distributions")
    warm_up: bool = Field(
        True, description="first train the new classes' head alone, for as many epochs as the task has"
    )


def distillation(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between softened distributions, averaged over the batch.

    Raising softmax probabilities to the power 1/T and normalising them again is softmax(logits / T).

    Args:
        old, new: logits [B, K] of the previous and of the current network; no gradient flows into ``old``.
        temperature: T.
    """
    target = (old.detach() / temperature).softmax(dim=1)
    return -(target * (new / temperature).log_softmax(dim=1)).sum(dim=1).mean()


class Lwf(Method):
    """L = CE over seen classes + alpha * distillation over past classes."""

    Config: ClassVar[type[MethodConfig]] = LwfConfig

    def __init__(self, network: nn.Module, setting: Setting, config: LwfConfig) -> None:
        super().__init__(network, setting, config)
        self.options = config
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self._recorded: Tensor | None = None

    def _bounds(self) -> tuple[int, int]:
        """Number of past classes, number of classes seen with the current task."""
        past = sum(self.setting.task_sizes[: self.task_index])
        return past, past + self.setting.task_sizes[self.task_index]

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.index == 0:
            return
        if self.options.warm_up:
            self._warm_up(task)
        self.teacher.load_state_dict(self.network.state_dict())

    def _warm_up(self, task: Task) -> None:
        """Fit the linear head on frozen features, within the new task's classes only."""
        head = linear_head(self.network, wanted_by="lwf with warm_up=true")
        rate = self.setting.make_optimizer(head.parameters()).defaults["lr"]
        optimizer = torch.optim.SGD(head.parameters(), lr=rate)
        past, seen = self._bounds()
        self.network.eval()
        for epoch in range(self.setting.epochs):
            generator = generator_for(self.setting.seed, WARM_UP_STREAM, task.index, epoch)
            order = torch.randperm(len(task.labels), generator=generator).to(task.labels.device)
            for chosen in order.split(self.setting.batch_size):
                raw = task.images[chosen.to(task.images.device)].to(task.labels.device)
                with torch.no_grad():
                    features = self.network.features(self.augmented(raw))  # type: ignore[operator]
                loss = F.cross_entropy(head(features)[:, past:seen], task.labels[chosen] - past)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.network.train()

    def training_data(self, task: Task) -> tuple[Tensor, Tensor]:
        """Besides: let the old network answer for every image of the task, once."""
        self._recorded = None
        if task.index > 0:
            self._recorded = self._old_logits(task)
        return super().training_data(task)

    @torch.no_grad()
    def _old_logits(self, task: Task) -> Tensor:
        """[N, past classes] of the previous network in evaluation mode."""
        self.teacher.eval()
        past, _ = self._bounds()
        logits = [
            time_mean(self.teacher(self.setting.augment.normalise(raw.to(task.labels.device))))[:, :past]
            for raw in task.images.split(256)
        ]
        return torch.cat(logits)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        past, seen = self._bounds()
        logits = time_mean(self.network(batch.x))
        terms = {"ce": F.cross_entropy(logits[:, :seen], batch.y)}
        if self._recorded is not None:
            old = self._recorded[batch.index]
            terms["distillation"] = self.options.alpha * distillation(old, logits[:, :past], self.options.temperature)
        return terms
