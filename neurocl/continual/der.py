"""Dark experience replay: DER replays images with the logits they once got, DER++ adds their labels.

Reference: Buzzega et al., "Dark experience for general continual learning", 2020, eq. 4 and 6.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.losses import logit_distance, time_mean
from neurocl.continual.method import Batch, Method, MethodConfig, Setting


class DerConfig(MethodConfig):
    """Hyper-parameters of DER."""

    alpha: float = Field(0.3, ge=0, description="weight of the distance to stored logits")


class DerppConfig(DerConfig):
    """Hyper-parameters of DER++."""

    alpha: float = Field(0.1, ge=0, description="weight of the distance to stored logits")
    beta: float = Field(0.5, ge=0, description="weight of the cross-entropy on replayed labels")


class Der(Method):
    """L = CE(batch) + alpha * MSE(logits, stored logits); a spiking network's logits are averaged over time."""

    Config: ClassVar[type[MethodConfig]] = DerConfig

    def __init__(self, network: nn.Module, setting: Setting, config: DerConfig) -> None:
        super().__init__(network, setting, config)
        self.alpha = config.alpha
        self.memory = self.make_memory({"logits": ((setting.num_classes,), torch.float32)})
        self._stream_logits: Tensor | None = None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.network(batch.x)
        self._stream_logits = time_mean(logits.detach())
        terms = {"ce": self.classification_loss(logits, batch.y)}
        if len(self.memory):
            drawn = self.memory.sample(self.setting.replay_batch)
            replayed = self.network(self.augmented(drawn["image"]))
            terms["logits"] = self.alpha * logit_distance(replayed, drawn["logits"])
        return terms

    def after_step(self, batch: Batch) -> None:
        assert self._stream_logits is not None
        self.memory.add(image=batch.raw, label=batch.y, logits=self._stream_logits)


class Derpp(Der):
    """DER plus beta * CE on an independent draw from memory."""

    Config: ClassVar[type[MethodConfig]] = DerppConfig

    def __init__(self, network: nn.Module, setting: Setting, config: DerppConfig) -> None:
        super().__init__(network, setting, config)
        self.beta = config.beta

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(batch)
        if len(self.memory):
            drawn = self.memory.sample(self.setting.replay_batch)
            logits = self.network(self.augmented(drawn["image"]))
            terms["replay"] = self.beta * self.classification_loss(logits, drawn["label"])
        return terms
