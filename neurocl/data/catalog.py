"""The benchmarks that can be chosen by name: what each is, and how its data are loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neurocl.data.dataset import ArrayDataset
from neurocl.errors import UserError
from neurocl.registry import Entry, Registry

AugmentMode = Literal["none", "crop-flip", "strong"]


@dataclass(frozen=True)
class Benchmark:
    """A data set cut into tasks, with the training defaults that papers use for it.

    Attributes:
        name: what the user types.
        source: the name of the data (``neurocl data download SOURCE``), or the path of a user's file.
        task_sizes: number of classes of each task, in label order.
        mean, std: per channel, of pixels in 0..1; None for no normalisation.
        augment: what training pictures go through, see ``neurocl.data.augment``.
        epochs: passes over each task.
        batch_size: samples of the stream in a step.
        image_shape: (C, H, W) of one picture or one event frame.
        is_events: whether samples are event frames [T, C, H, W].
        summary: one line for listings.
        licence: the terms of the data.
        loader: reads the data from (data folder or None, number of time bins or None).
    """

    name: str
    source: str
    task_sizes: tuple[int, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    augment: AugmentMode
    epochs: int
    batch_size: int
    image_shape: tuple[int, int, int]
    is_events: bool
    summary: str
    licence: str
    loader: Callable[[Path | None, int | None], ArrayDataset]

    @property
    def num_classes(self) -> int:
        return sum(self.task_sizes)


def _builtin(name: str, summary: str) -> Entry:
    return Entry(name, f"neurocl.data.benchmarks:{name.replace('-', '_').upper()}", summary)


DATASETS = Registry(
    "datasets",
    (
        _builtin("seq-digits", "handwritten digits 8 x 8, 5 tasks of 2 classes; comes with the installation"),
        _builtin("seq-mnist", "handwritten digits 28 x 28, 5 tasks of 2 classes"),
        _builtin("seq-fashion-mnist", "clothes 28 x 28, 5 tasks of 2 classes"),
        _builtin("seq-kmnist", "handwritten Japanese characters 28 x 28, 5 tasks of 2 classes"),
        _builtin("seq-cifar10", "photographs 32 x 32, 5 tasks of 2 classes"),
        _builtin("seq-cifar100", "photographs 32 x 32, 10 tasks of 10 classes"),
        _builtin("seq-tiny-imagenet-100", "photographs 64 x 64, 10 tasks of 10 classes"),
        _builtin("seq-eurosat", "satellite land use 64 x 64, 5 tasks of 2 classes"),
        _builtin("seq-nmnist", "event-camera digits 34 x 34, 5 tasks of 2 classes"),
    ),
)


def is_data_file(name: str) -> bool:
    """Whether a data set name is the path of a user's own npz."""
    return name.endswith(".npz")


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name, or tasks of two classes over a user's own ``.npz`` file.

    Raises:
        UserError: unknown name, unreadable file, or a plug-in that is not a ``Benchmark``.
    """
    if is_data_file(name):
        return _own_benchmark(Path(name).expanduser())
    benchmark = DATASETS.load(name)
    if not isinstance(benchmark, Benchmark):
        raise UserError(
            f"dataset {name!r} (from {DATASETS.entry(name).source}) must be a neurocl.data.Benchmark, "
            f"got {type(benchmark).__name__}"
        )
    return benchmark


def load_dataset(name: str, *, data_dir: str | Path | None = None, timesteps: int | None = None) -> ArrayDataset:
    """Load the data of a benchmark, or a user's own ``.npz`` file.

    Args:
        data_dir: looked in first, before ``$NEUROCL_DATA`` and the user's cache.
        timesteps: number of time bins; needed for event sets, of no effect on the others.
    Raises:
        UserError: unknown name, absent or damaged data, missing ``timesteps``, or data that do not fit
            the benchmark's classes and shape.
    """
    benchmark = load_benchmark(name)
    if timesteps is not None and timesteps < 1:
        raise UserError(f"timesteps must be at least 1, got {timesteps}")
    if benchmark.is_events and timesteps is None:
        raise UserError(f"{name} is a set of events: say into how many frames to bin them (timesteps)")
    dataset = benchmark.loader(Path(data_dir) if data_dir else None, timesteps)
    if dataset.num_classes != benchmark.num_classes:
        raise UserError(f"{name}: the data have {dataset.num_classes} classes, the tasks {benchmark.num_classes}")
    shape = dataset.train_images.shape[-3:]
    if shape != benchmark.image_shape or dataset.is_events != benchmark.is_events:
        raise UserError(
            f"{name}: pictures of shape {dataset.train_images.shape[1:]} do not fit {benchmark.image_shape}"
        )
    return dataset


def _own_benchmark(path: Path) -> Benchmark:
    """The benchmark of a user's file, which is unpacked once as long as it does not change."""
    try:
        status = path.stat()
    except OSError:
        raise UserError(f"{path}: no such file") from None
    return _read_own_benchmark(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _read_own_benchmark(path: Path, modified: int, size: int) -> Benchmark:
    from neurocl.data.custom import default_task_sizes, read_custom

    dataset = read_custom(path)
    channels, height, width = dataset.train_images.shape[1:]
    return Benchmark(
        name=path.stem,
        source=str(path),
        task_sizes=default_task_sizes(dataset.num_classes),
        mean=None,
        std=None,
        augment="none",
        epochs=5,
        batch_size=16,
        image_shape=(channels, height, width),
        is_events=False,
        summary=f"{len(dataset.train_labels)} + {len(dataset.test_labels)} pictures from {path.name}",
        licence="the user's own",
        loader=lambda data_dir, timesteps: dataset,
    )
