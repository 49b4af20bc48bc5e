"""neurocl: learning systems that keep learning, from one command line or from Python.

Subpackages are imported when first used: ``from neurocl import spiking`` costs what spiking needs,
``import neurocl`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurocl import backbones, continual, data, federated, merging, spiking, trajectory

__version__ = "0.1.0"
__all__ = ["__version__", "backbones", "continual", "data", "federated", "merging", "spiking", "trajectory"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"neurocl.{name}")
    raise AttributeError(f"module 'neurocl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
