"""ER-ACE: replay in which the current batch does not push down the classes it does not contain.

Reference: Caccia et al., "New insights on reducing abrupt representation change in online continual
learning", 2022, section 4. The released code leaves the highest class seen so far unmasked; that
variant is behind the option ``mask``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.heads import head_owner, linear_head
from neurocl.continual.losses import time_mean
from neurocl.continual.method import Batch, Method, MethodConfig, Setting

MASKED = -1e9


class ErAceConfig(MethodConfig):
    """Hyper-parameters of ER-ACE."""

    task_free: bool = Field(False, description="mask and replay within the first task too")
    mask: Literal["paper", "released"] = Field(
        "paper", description="released: leave the highest class met so far unmasked, as the released code does"
    )
    cosine: bool = Field(True, description="classify by scaled cosine similarity, as the released code does")
    scale: float = Field(10.0, gt=0, description="factor of the cosine similarity")


class CosineHead(nn.Linear):
    """Linear layer without bias on normalised features and weights, times ``scale``."""

    def __init__(self, num_features: int, num_classes: int, scale: float) -> None:
        super().__init__(num_features, num_classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., K]."""
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def asymmetric_cross_entropy(
    logits: Tensor, labels: Tensor, seen_before: Tensor, *, spare_highest: bool = False
) -> Tensor:
    """Cross-entropy over the classes present in the batch and the classes never met.

    Args:
        logits: [B, K].
        labels: [B].
        seen_before: bool [K], classes met before this batch; those absent from it are masked out.
        spare_highest: never mask the highest class met up to and with this batch.
    """
    present = torch.zeros_like(seen_before)
    present[labels] = True
    if spare_highest:
        present[(seen_before | present).nonzero().max()] = True
    return F.cross_entropy(logits.masked_fill(seen_before & ~present, MASKED), labels)


class ErAce(Method):
    """L = asymmetric CE(batch) + CE(memory draw); plain CE and no replay within the first task."""

    Config: ClassVar[type[MethodConfig]] = ErAceConfig
    seen: Tensor

    def __init__(self, network: nn.Module, setting: Setting, config: ErAceConfig) -> None:
        super().__init__(network, setting, config)
        self.options = config
        if config.cosine:
            head = linear_head(network, wanted_by="er-ace with cosine=true")
            head_owner(network).head = CosineHead(head.in_features, head.out_features, config.scale)
        self.memory = self.make_memory()
        self.register_buffer("seen", torch.zeros(setting.num_classes, dtype=torch.bool))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = time_mean(self.network(batch.x))
        first = self.task_index == 0 and not self.options.task_free
        terms = {"ce": F.cross_entropy(logits, batch.y) if first else self._asymmetric(logits, batch.y)}
        if len(self.memory) and not first:
            drawn = self.memory.sample(self.setting.replay_batch)
            replayed = self.network(self.augmented(drawn["image"]))
            terms["replay"] = self.classification_loss(replayed, drawn["label"])
        return terms

    def _asymmetric(self, logits: Tensor, labels: Tensor) -> Tensor:
        released = self.options.mask == "released"
        return asymmetric_cross_entropy(logits, labels, self.seen, spare_highest=released)

    def after_step(self, batch: Batch) -> None:
        self.seen[batch.y] = True
        self.memory.add(image=batch.raw, label=batch.y)
