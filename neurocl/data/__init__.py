"""Data sets: embedded, local or downloaded, as arrays; benchmarks that cut them into tasks; augmentation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurocl.data.augment import Augment
    from neurocl.data.catalog import DATASETS, Benchmark, load_benchmark, load_dataset
    from neurocl.data.dataset import ArrayDataset
    from neurocl.data.install import download

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "Augment",
    "Benchmark",
    "download",
    "load_benchmark",
    "load_dataset",
]

_HOMES = {
    "DATASETS": "catalog",
    "ArrayDataset": "dataset",
    "Augment": "augment",
    "Benchmark": "catalog",
    "download": "install",
    "load_benchmark": "catalog",
    "load_dataset": "catalog",
}


def __getattr__(name: str) -> Any:
    # on first use: listing names must not import NumPy or torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
