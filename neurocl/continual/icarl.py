"""iCaRL: herded exemplars, distillation on sigmoids, and classification by the nearest mean of exemplars.

Reference: Rebuffi et al., "iCaRL: incremental classifier and representation learning", 2017.
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
from neurocl.errors import UserError

CHUNK = 256
UNKNOWN = -1e9


class IcarlConfig(MethodConfig):
    """Hyper-parameters of iCaRL."""

    weight_penalty: float = Field(1e-5, ge=0, description="factor of the sum of squared weights in the loss")


def icarl_loss(logits: Tensor, labels: Tensor, old_sigmoid: Tensor | None) -> Tensor:
    """Binary cross-entropy, mean over batch and classes; past columns imitate the old network.

    Args:
        logits: [B, K] over the classes seen so far.
        labels: [B].
        old_sigmoid: [B, past] sigmoids of the previous network, None in the first task.
    """
    target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    if old_sigmoid is not None:
        target[:, : old_sigmoid.shape[1]] = old_sigmoid
    return F.binary_cross_entropy_with_logits(logits, target)


def herding(features: Tensor, count: int) -> Tensor:
    """Indices of ``count`` items whose running mean stays closest to the mean of all.

    Args:
        features: L2-normalised features of one class [N, D].
        count: items to choose, at most N.

    Reference: Rebuffi et al., 2017, algorithm 4.
    """
    mean = features.mean(dim=0)
    chosen: list[int] = []
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for size in range(1, count + 1):
        distance = (mean - (features + total) / size).norm(dim=1)
        best = int(distance.masked_fill(~free, float("inf")).argmin())
        chosen.append(best)
        free[best] = False
        total += features[best]
    return torch.tensor(chosen, dtype=torch.int64, device=features.device)


class Icarl(Method):
    """Trains on the task and the exemplars together; predicts by the nearest exemplar mean.

    Raises:
        UserError: fewer memory items than classes, or a backbone without ``features``.
    """

    Config: ClassVar[type[MethodConfig]] = IcarlConfig
    class_means: Tensor
    known: Tensor

    def __init__(self, network: nn.Module, setting: Setting, config: IcarlConfig) -> None:
        super().__init__(network, setting, config)
        if setting.buffer_size < setting.num_classes:
            raise UserError(
                f"icarl keeps exemplars of every class: buffer_size must be at least {setting.num_classes}, "
                f"got {setting.buffer_size}"
            )
        self.options = config
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.memory = self.make_memory()
        num_features = linear_head(network, wanted_by="icarl").in_features
        self.register_buffer("class_means", torch.zeros(setting.num_classes, num_features))
        self.register_buffer("known", torch.zeros(setting.num_classes, dtype=torch.bool))

    def _bounds(self) -> tuple[int, int]:
        past = sum(self.setting.task_sizes[: self.task_index])
        return past, past + self.setting.task_sizes[self.task_index]

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.teacher.load_state_dict(self.network.state_dict())

    def training_data(self, task: Task) -> tuple[Tensor, Tensor]:
        if not len(self.memory):
            return task.images, task.labels
        images = torch.cat([task.images, self.memory.field("image").to(task.images.device)])
        return images, torch.cat([task.labels, self.memory.field("label")])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        past, seen = self._bounds()
        old = None
        if past:
            self.teacher.eval()
            with torch.no_grad():
                old = time_mean(self.teacher(batch.x))[:, :past].sigmoid()
        logits = time_mean(self.network(batch.x))[:, :seen]
        terms = {"bce": icarl_loss(logits, batch.y, old)}
        if self.options.weight_penalty:
            squares = [parameter.square().sum() for parameter in self.network.parameters()]
            terms["weights"] = self.options.weight_penalty * torch.stack(squares).sum()
        return terms

    @torch.no_grad()
    def _features(self, images: Tensor, flip: bool = False) -> Tensor:
        """L2-normalised features [N, D] of raw items, of their mirror images if ``flip``."""
        parts = []
        for raw in images.split(CHUNK):
            x = self.setting.augment.normalise(raw.to(self.class_means.device))
            parts.append(self.network.features(x.flip(-1) if flip else x))  # type: ignore[operator]
        return F.normalize(torch.cat(parts).float(), dim=1)

    def end_task(self, task: Task) -> None:
        self.network.eval()
        _, seen = self._bounds()
        quota = self.setting.buffer_size // seen
        images, labels = [], []
        stored, stored_labels = self.memory.field("image"), self.memory.field("label")
        for label in range(task.classes.start):
            members = torch.nonzero(stored_labels == label).flatten()[:quota]
            images.append(stored[members])
            labels.append(stored_labels[members])
        for label in task.classes:
            members = torch.nonzero(task.labels == label).flatten()
            if not len(members):
                continue
            candidates = task.images[members.to(task.images.device)]
            chosen = herding(self._features(candidates), min(quota, len(members)))
            images.append(candidates[chosen.to(candidates.device)].to(stored.device))
            labels.append(torch.full((len(chosen),), label, device=stored_labels.device))
        self.memory.replace(image=torch.cat(images), label=torch.cat(labels))
        self._update_means()
        self.network.train()

    def _update_means(self) -> None:
        """Mean of normalised features of the exemplars and their mirror images, per class, normalised."""
        images, labels = self.memory.field("image"), self.memory.field("label")
        features = self._features(images) + self._features(images, flip=True)
        # a product with one-hot rows, because scattered additions have no fixed order on a GPU
        sums = F.one_hot(labels, len(self.class_means)).to(features.dtype).T @ features
        self.class_means.copy_(F.normalize(sums, dim=1))
        self.known.zero_()
        self.known[labels] = True

    def forward(self, x: Tensor) -> Tensor:
        """Negative squared distance of normalised features to each class mean, [B, K]."""
        features = F.normalize(self.network.features(x).float(), dim=1)  # type: ignore[operator]
        scores = -torch.cdist(features, self.class_means).square()
        return scores.masked_fill(~self.known, UNKNOWN)
