"""Data sets: embedded, local or downloaded, as arrays; benchmarks that cut them into tasks; augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neurocl.lazy import lazy_attributes

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

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
