"""Picture domains for multi-domain experiments: the same few splits for very different sets, all loaded by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.data.imgpack import read_imgpack, read_imgpack_dataset
from neurocl.data.locate import absent, find_file
from neurocl.data.npz import read_npz
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

VALIDATION_SHARE = 0.15


@dataclass(frozen=True)
class Domain:
    """One picture domain with its three splits.

    Attributes:
        name: what the user types.
        images, labels: by split (``train``, ``val``, ``test``): uint8 [N, C, H, W] and int64 [N].
        class_names: in label order.
    """

    name: str
    images: dict[str, Images]
    labels: dict[str, Labels]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _packed(folder: str, file: str) -> Callable[[Path | None], ArrayDataset]:
    def load(data_dir: Path | None) -> ArrayDataset:
        place = find_file([folder], [file], data_dir)
        if place is None:
            raise absent(folder, data_dir, downloadable=False)
        return read_imgpack_dataset(place, folder)

    return load


def _benchmark(name: str) -> Callable[[Path | None], ArrayDataset]:
    def load(data_dir: Path | None) -> ArrayDataset:
        from neurocl.data.catalog import load_dataset

        return load_dataset(name, data_dir=data_dir)

    return load


def _emoji(data_dir: Path | None) -> ArrayDataset:
    """Categories of emoji; trained on one vendor's drawings, tested on another's."""
    place = find_file(["emoji-text"], ["emoji64.npz"], data_dir)
    if place is None:
        raise absent("emoji-text", data_dir, downloadable=False)
    arrays = read_npz(place, ["labels", "class_names"])
    labels = arrays["labels"].astype(np.int64)
    names = tuple(str(name) for name in arrays["class_names"])
    return ArrayDataset("emoji", read_imgpack(place, "google"), labels, read_imgpack(place, "twitter"), labels, names)


# name: (loader, most training and most test pictures of a class)
_DOMAINS: dict[str, tuple[Callable[[Path | None], ArrayDataset], int, int]] = {
    "cifar10": (_benchmark("seq-cifar10"), 300, 100),
    "dtd10": (_packed("dtd10", "dtd10_64.npz"), 300, 100),
    "emoji": (_emoji, 300, 100),
    "eurosat": (_packed("eurosat", "eurosat64.npz"), 320, 100),
    "flowers5": (_packed("flowers5", "flowers5_64.npz"), 300, 100),
    "gtsrb": (_packed("gtsrb", "gtsrb64.npz"), 300, 100),
    "mnist": (_benchmark("seq-mnist"), 300, 100),
    "pacs": (_packed("pacs", "pacs64.npz"), 400, 200),
    "tiny-imagenet-100": (_packed("tiny-imagenet-100", "tiny_imagenet_100.npz"), 100, 20),
}
PICTURE_DOMAINS = tuple(name for name in _DOMAINS if name != "tiny-imagenet-100")


def load_domain(name: str, *, data_dir: Path | None = None, seed: int = 0) -> Domain:
    """Load a domain and cut it: the first so many pictures of each class, 15 % of the training part for validation.

    Args:
        name: one of ``PICTURE_DOMAINS``, or ``tiny-imagenet-100``, which the others are pre-trained on.
        data_dir: looked in first.
        seed: of the validation split.

    Raises:
        UserError: unknown name, or data that are not here.
    """
    if name not in _DOMAINS:
        raise UserError(
            f"unknown picture domain {name!r}{did_you_mean(name, _DOMAINS)} (choose from {', '.join(_DOMAINS)})"
        )
    load, most_train, most_test = _DOMAINS[name]
    data = load(data_dir)
    train = first_of_each_class(data.train_labels, most_train)
    test = first_of_each_class(data.test_labels, most_test)
    order = np.random.default_rng([seed, 7]).permutation(train)
    held_out = int(len(order) * VALIDATION_SHARE)
    parts = {"val": np.sort(order[:held_out]), "train": np.sort(order[held_out:])}
    images = {split: data.train_images[rows] for split, rows in parts.items()}
    labels = {split: data.train_labels[rows] for split, rows in parts.items()}
    return Domain(
        name,
        {**images, "test": data.test_images[test]},
        {**labels, "test": data.test_labels[test]},
        data.class_names,
    )


def first_of_each_class(labels: Labels, most: int) -> NDArray[np.int64]:
    """Positions of the first ``most`` items of every class, in order."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    rank = np.arange(len(order)) - starts
    return np.sort(order[rank < most])


def digits_domains(seed: int = 0) -> list[Domain]:
    """Handwritten digits, 8 x 8, in four guises: a quarter turned, inverted, mirrored, and wrapped around by half.

    The pictures are the real ones that scikit-learn carries, so this suite needs no download. Every guise has the
    same split; the upright original, what a base is pre-trained on, comes first under the name ``upright``.
    """
    from neurocl.data.catalog import load_dataset

    data = load_dataset("seq-digits")
    order = np.random.default_rng([seed, 7]).permutation(len(data.train_labels))
    held_out = int(len(order) * VALIDATION_SHARE)
    rows = {"val": np.sort(order[:held_out]), "train": np.sort(order[held_out:])}
    images = {split: data.train_images[index] for split, index in rows.items()} | {"test": data.test_images}
    labels = {split: data.train_labels[index] for split, index in rows.items()} | {"test": data.test_labels}
    brightest = int(data.train_images.max())
    guises: dict[str, Callable[[Images], Images]] = {
        "upright": lambda x: x,
        "turned": lambda x: np.rot90(x, axes=(2, 3)),
        "inverted": lambda x: np.uint8(brightest) - x,
        "mirrored": lambda x: x[..., ::-1],
        "wrapped": lambda x: np.roll(x, x.shape[-1] // 2, axis=-1),
    }
    return [
        Domain(
            name,
            {split: np.ascontiguousarray(guise(values)) for split, values in images.items()},
            labels,
            data.class_names,
        )
        for name, guise in guises.items()
    ]
