"""Online EWC: weights that mattered for old tasks are held back by a quadratic penalty.

Reference: Kirkpatrick et al., 2017; Schwarz et al., "Progress & compress", 2018, for the running Fisher.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from neurocl.continual.losses import time_mean
from neurocl.continual.method import Batch, Method, MethodConfig, Setting
from neurocl.continual.scenario import Task

GRADIENT_VALUES = 1 << 25  # of all samples in one chunk
LARGEST_CHUNK = 64


class EwcConfig(MethodConfig):
    """Hyper-parameters of online EWC."""

    penalty: float = Field(10.0, ge=0, description="lambda, weight of the quadratic penalty")
    gamma: float = Field(1.0, ge=0, le=1, description="decay of the old Fisher at each task end")


class EwcOnline(Method):
    """L = CE + lambda * sum F (theta - theta*)^2, with F and theta* renewed at every task end."""

    Config: ClassVar[type[MethodConfig]] = EwcConfig

    def __init__(self, network: nn.Module, setting: Setting, config: EwcConfig) -> None:
        super().__init__(network, setting, config)
        self.options = config
        self.learnt = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        for index, name in enumerate(self.learnt):
            parameter = network.get_parameter(name)
            self.register_buffer(f"fisher_{index}", torch.zeros_like(parameter))
            self.register_buffer(f"anchor_{index}", torch.zeros_like(parameter))

    def penalty(self) -> Tensor:
        """sum F (theta - theta*)^2 over all weights."""
        terms = []
        for index, name in enumerate(self.learnt):
            moved = self.network.get_parameter(name) - self.get_buffer(f"anchor_{index}")
            terms.append((self.get_buffer(f"fisher_{index}") * moved**2).sum())
        return torch.stack(terms).sum()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(batch)
        if self.task_index > 0:
            terms["ewc"] = self.options.penalty * self.penalty()
        return terms

    @torch.no_grad()
    def fisher(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Diagonal Fisher as Mammoth estimates it: squared per-sample gradients of log p(y|x), weighted by p(y|x).

        The network is in evaluation mode, so that a sample's gradient does not depend on its neighbours.
        """
        parameters = {name: self.network.get_parameter(name).detach() for name in self.learnt}
        buffers = dict(self.network.named_buffers())

        def log_probability(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output: Any = torch.func.functional_call(self.network, {**weights, **buffers}, (x.unsqueeze(0),))
            return -F.cross_entropy(time_mean(output), y.unsqueeze(0))

        per_sample = torch.func.vmap(torch.func.grad_and_value(log_probability), in_dims=(None, 0, 0))
        sums = [torch.zeros_like(value) for value in parameters.values()]
        size = sum(value.numel() for value in parameters.values())
        chunk = max(1, min(LARGEST_CHUNK, GRADIENT_VALUES // size))
        self.network.eval()
        for raw, y in zip(images.split(chunk), labels.split(chunk), strict=True):
            gradients, values = per_sample(parameters, self.setting.augment.normalise(raw.to(labels.device)), y)
            weights = values.exp()
            for total, name in zip(sums, self.learnt, strict=True):
                total += torch.einsum("b,b...->...", weights, gradients[name] ** 2)
        self.network.train()
        return [total / len(labels) for total in sums]

    def end_task(self, task: Task) -> None:
        fresh = self.fisher(task.images, task.labels)
        for index, (name, value) in enumerate(zip(self.learnt, fresh, strict=True)):
            self.get_buffer(f"fisher_{index}").mul_(self.options.gamma).add_(value)
            self.get_buffer(f"anchor_{index}").copy_(self.network.get_parameter(name).detach())
