"""The optimiser of a run: built anew at every task, its rate a function of the epoch, its state fit for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neurocl.continual.config import OptimizerConfig, TrainConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser; one fused kernel over all parameters where the device has it."""
    listed = [parameter for parameter in parameters if parameter.requires_grad]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    common["fused"] = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in listed)
    if config.name == "sgd":
        return torch.optim.SGD(listed, momentum=config.momentum, **common)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(listed, betas=config.betas, **common)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Rate of one epoch within a task; the schedule restarts at every task."""
    base = config.optimizer.lr
    if config.schedule == "cosine":
        return 0.5 * base * (1.0 + math.cos(math.pi * epoch / config.epochs))
    if config.schedule == "multistep":
        return base * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
    return base


def restore_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's tensors the memory layout of their parameters, which a checkpoint does not keep.

    Fused optimisers walk parameter and moments through memory side by side.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()
