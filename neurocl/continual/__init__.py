"""Continual learning: scenarios, methods, the training loop, replay memories and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

if TYPE_CHECKING:
    from neurocl.continual.building import resolve
    from neurocl.continual.catalog import METHODS
    from neurocl.continual.config import OptimizerConfig, TrainConfig
    from neurocl.continual.memory import Memory
    from neurocl.continual.method import Batch, Method, MethodConfig, Setting
    from neurocl.continual.scenario import Scenario, Task
    from neurocl.continual.training import RunResult, resume, train

_HOMES = {
    "METHODS": "catalog",
    "OptimizerConfig": "config",
    "TrainConfig": "config",
    "Memory": "memory",
    "Batch": "method",
    "Method": "method",
    "MethodConfig": "method",
    "Setting": "method",
    "Scenario": "scenario",
    "Task": "scenario",
    "RunResult": "training",
    "resolve": "building",
    "resume": "training",
    "train": "training",
}

__all__ = [
    "METHODS",
    "Batch",
    "Memory",
    "Method",
    "MethodConfig",
    "OptimizerConfig",
    "RunResult",
    "Scenario",
    "Setting",
    "Task",
    "TrainConfig",
    "resolve",
    "resume",
    "train",
]

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
