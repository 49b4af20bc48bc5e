"""The built-in benchmarks: splits, normalisation and training defaults as the papers have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from neurocl.data.catalog import Benchmark
from neurocl.data.cifar import CIFAR10 as CIFAR10_LAYOUT
from neurocl.data.cifar import CIFAR100 as CIFAR100_LAYOUT
from neurocl.data.cifar import read_cifar
from neurocl.data.dataset import ArrayDataset
from neurocl.data.events import read_nmnist
from neurocl.data.idx import read_idx_folder
from neurocl.data.imgpack import read_imgpack_dataset
from neurocl.data.locate import absent
from neurocl.data.sources import SOURCES, locate_source

_Loader = Callable[[Path | None, int | None], ArrayDataset]

_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_FASHION_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_KMNIST_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_DIGITS_TRAIN = 1297


def load_digits() -> ArrayDataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: a fixed shuffle, 1,297 for training, 500 for testing.

    The 17 grey levels 0..16 are stretched to 0..255 and rounded.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images = np.rint(bunch.images[order, None] / 16 * 255).astype(np.uint8)
    labels = bunch.target[order].astype(np.int64)
    return ArrayDataset(
        "digits",
        images[:_DIGITS_TRAIN],
        labels[:_DIGITS_TRAIN],
        images[_DIGITS_TRAIN:],
        labels[_DIGITS_TRAIN:],
        _DIGIT_NAMES,
    )


def load_source(source: str, data_dir: Path | None = None, timesteps: int | None = None) -> ArrayDataset:
    """Find and read one of the sets of ``neurocl.data.sources``.

    Raises:
        UserError: the set is absent (with the command that fetches it) or damaged.
    """
    place = locate_source(source, data_dir)
    if place is None:
        raise absent(source, data_dir, downloadable=SOURCES[source].downloadable)
    return read_source(source, place, timesteps)


def read_source(source: str, place: Path, timesteps: int | None = None) -> ArrayDataset:
    """Read a set from the file or folder that shows it is there (see ``locate_source``)."""
    if place.suffix == ".npz" and source != "nmnist":
        return read_imgpack_dataset(place, source)
    if source == "nmnist":
        return read_nmnist(place if place.is_file() else place.parent, timesteps or 1)
    if source in (CIFAR10_LAYOUT.name, CIFAR100_LAYOUT.name):
        return read_cifar(place.parent, complete=True)
    names = {"fashion-mnist": _FASHION_NAMES, "kmnist": _KMNIST_NAMES}.get(source, _DIGIT_NAMES)
    return read_idx_folder(place.parent, source, names)


def _from(source: str) -> _Loader:
    return lambda data_dir, timesteps: load_source(source, data_dir, timesteps)


def _mnist_like(name: str, source: str, summary: str) -> Benchmark:
    return Benchmark(
        name=name,
        source=source,
        task_sizes=(2,) * 5,
        mean=None,
        std=None,
        augment="none",
        epochs=1,
        batch_size=10,
        image_shape=(1, 28, 28),
        is_events=False,
        summary=summary,
        licence=SOURCES[source].licence,
        loader=_from(source),
    )


SEQ_DIGITS = Benchmark(
    name="seq-digits",
    source="digits",
    task_sizes=(2,) * 5,
    mean=None,
    std=None,
    augment="none",
    epochs=20,
    batch_size=16,
    image_shape=(1, 8, 8),
    is_events=False,
    summary="handwritten digits 8 x 8, 1,297 + 500, from scikit-learn",
    licence="CC BY 4.0 (UCI)",
    loader=lambda data_dir, timesteps: load_digits(),
)

SEQ_MNIST = _mnist_like("seq-mnist", "mnist", "handwritten digits, 60,000 + 10,000")
SEQ_FASHION_MNIST = _mnist_like("seq-fashion-mnist", "fashion-mnist", "clothes, 60,000 + 10,000")
SEQ_KMNIST = _mnist_like("seq-kmnist", "kmnist", "cursive Japanese characters, 60,000 + 10,000")

SEQ_CIFAR10 = Benchmark(
    name="seq-cifar10",
    source="cifar10",
    task_sizes=(2,) * 5,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2615),
    augment="crop-flip",
    epochs=50,
    batch_size=32,
    image_shape=(3, 32, 32),
    is_events=False,
    summary="photographs of 10 classes, 50,000 + 10,000",
    licence=SOURCES["cifar10"].licence,
    loader=_from("cifar10"),
)

SEQ_CIFAR100 = Benchmark(
    name="seq-cifar100",
    source="cifar100",
    task_sizes=(10,) * 10,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    augment="crop-flip",
    epochs=50,
    batch_size=32,
    image_shape=(3, 32, 32),
    is_events=False,
    summary="photographs of 100 classes, 50,000 + 10,000",
    licence=SOURCES["cifar100"].licence,
    loader=_from("cifar100"),
)

SEQ_TINY_IMAGENET_100 = Benchmark(
    name="seq-tiny-imagenet-100",
    source="tiny-imagenet-100",
    task_sizes=(10,) * 10,
    mean=(0.4802, 0.4480, 0.3975),
    std=(0.2770, 0.2691, 0.2821),
    augment="crop-flip",
    epochs=50,
    batch_size=32,
    image_shape=(3, 64, 64),
    is_events=False,
    summary="photographs of 100 of the 200 classes, 10,000 + 2,000",
    licence=SOURCES["tiny-imagenet-100"].licence,
    loader=_from("tiny-imagenet-100"),
)

SEQ_EUROSAT = Benchmark(
    name="seq-eurosat",
    source="eurosat",
    task_sizes=(2,) * 5,
    mean=(0.3445, 0.3834, 0.4096),
    std=(0.2015, 0.1379, 0.1189),
    augment="crop-flip",
    epochs=10,
    batch_size=32,
    image_shape=(3, 64, 64),
    is_events=False,
    summary="satellite land use, 3,200 + 800",
    licence=SOURCES["eurosat"].licence,
    loader=_from("eurosat"),
)

SEQ_NMNIST = Benchmark(
    name="seq-nmnist",
    source="nmnist",
    task_sizes=(2,) * 5,
    # pixels are scaled by 1/255 first: this pair undoes it, so that networks see event counts
    mean=(0.0, 0.0),
    std=(1 / 255, 1 / 255),
    augment="none",
    epochs=5,
    batch_size=10,
    image_shape=(2, 34, 34),
    is_events=True,
    summary="event-camera digits, 60,000 + 10,000 (or a packed part of them)",
    licence=SOURCES["nmnist"].licence,
    loader=_from("nmnist"),
)
