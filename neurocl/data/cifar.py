"""The binary batches of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.errors import UserError

_PIXELS = 3 * 32 * 32


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CIFAR10_CLASSES = _names("airplane automobile bird cat deer dog frog horse ship truck")
CIFAR100_CLASSES = _names(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm"""
)
CIFAR100_COARSE_CLASSES = _names(
    """aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things
    large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals non-insect_invertebrates
    people reptiles small_mammals trees vehicles_1 vehicles_2"""
)


@dataclass(frozen=True)
class _Layout:
    """Which files a variant has, and the label bytes in front of each record's pixels."""

    name: str
    train_files: tuple[str, ...]
    test_file: str
    label_bytes: int
    pickles: tuple[str, ...]
    archive: str
    records_per_file: tuple[int, int]


CIFAR10 = _Layout(
    "cifar10",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test_batch.bin",
    1,
    ("data_batch_1", "test_batch"),
    "cifar-10-binary.tar.gz",
    (10_000, 10_000),
)
CIFAR100 = _Layout(
    "cifar100",
    ("train.bin",),
    "test.bin",
    2,
    ("train", "test"),
    "cifar-100-binary.tar.gz",
    (50_000, 10_000),
)


def read_cifar(folder: Path, *, labels: Literal["fine", "coarse"] = "fine", complete: bool = False) -> ArrayDataset:
    """Read a folder of binary batches; the file names tell CIFAR-10 from CIFAR-100.

    A record is one label byte (CIFAR-100: coarse, then fine) and 3,072 pixel bytes, channel first.

    Args:
        labels: which of CIFAR-100's two labels to take; CIFAR-10 has only ``"fine"``.
        complete: insist on the published number of records, so that a file cut between two records
            is noticed.
    Returns: pictures [N, 3, 32, 32].
    Raises:
        UserError: a missing file, a size that is no whole number of records, a label out of range, or
            a folder that holds only the Python pickles.
    Reference: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    layout = _recognise(folder)
    if labels == "coarse" and layout is CIFAR10:
        raise UserError(f"{folder}: CIFAR-10 has no coarse labels")
    if layout is CIFAR10:
        class_names = CIFAR10_CLASSES
    else:
        class_names = CIFAR100_COARSE_CLASSES if labels == "coarse" else CIFAR100_CLASSES
    # the label just before the pixels is the fine one
    column = 0 if labels == "coarse" else layout.label_bytes - 1
    counts = layout.records_per_file if complete else (None, None)
    train = [
        _read_batch(folder / name, layout.label_bytes, column, len(class_names), counts[0])
        for name in layout.train_files
    ]
    test = _read_batch(folder / layout.test_file, layout.label_bytes, column, len(class_names), counts[1])
    return ArrayDataset(
        layout.name,
        np.concatenate([images for images, _ in train]),
        np.concatenate([targets for _, targets in train]),
        *test,
        class_names,
    )


def _recognise(folder: Path) -> _Layout:
    for layout in (CIFAR10, CIFAR100):
        if (folder / layout.test_file).is_file() or (folder / layout.train_files[0]).is_file():
            return layout
    for layout in (CIFAR10, CIFAR100):
        if all((folder / name).is_file() for name in layout.pickles):
            raise UserError(
                f"{folder}: these are the Python pickles of {layout.name}; neurocl reads no pickles, "
                f"take the binary archive {layout.archive} (neurocl data download {layout.name})"
            )
    raise UserError(f"{folder}: no CIFAR batches (*.bin) there")


def _read_batch(
    path: Path, label_bytes: int, column: int, num_classes: int, expected: int | None
) -> tuple[Images, Labels]:
    record = label_bytes + _PIXELS
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    if size == 0 or size % record:
        raise UserError(f"{path}: {size} bytes is not a whole number of records of {record} bytes")
    if expected is not None and size != expected * record:
        raise UserError(f"{path}: {size // record} records, {expected} expected; the file is not complete")
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, record)
    targets = records[:, column].astype(np.int64)
    if targets.max() >= num_classes:
        row = int(targets.argmax())
        raise UserError(f"{path}: record {row} has label {targets[row]}, out of range 0 to {num_classes - 1}")
    return np.ascontiguousarray(records[:, label_bytes:]).reshape(-1, 3, 32, 32), targets
