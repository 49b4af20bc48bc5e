"""Experience replay: cross-entropy on the current batch together with a batch from memory.

Reference: Chaudhry et al., "On tiny episodic memories in continual learning", 2019.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.method import Batch, Method, MethodConfig, Setting


class ErConfig(MethodConfig):
    """Hyper-parameters of experience replay."""

    policy: Literal["reservoir", "balanced"] = Field("reservoir", description="how memory slots are given away")


class Er(Method):
    """L = CE(cat(batch, memory draw)); the memory is filled by reservoir sampling after each step."""

    Config: ClassVar[type[MethodConfig]] = ErConfig

    def __init__(self, network: nn.Module, setting: Setting, config: ErConfig) -> None:
        super().__init__(network, setting, config)
        self.memory = self.make_memory(policy=config.policy)

    def with_replay(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Current and replayed input and labels, the current ones first."""
        if not len(self.memory):
            return batch.x, batch.y
        drawn = self.memory.sample(self.setting.replay_batch)
        x = torch.cat([batch.x, self.augmented(drawn["image"])])
        return x, torch.cat([batch.y, drawn["label"]])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        x, y = self.with_replay(batch)
        return {"ce": self.classification_loss(self.network(x), y)}

    def after_step(self, batch: Batch) -> None:
        self.memory.add(image=batch.raw, label=batch.y)
