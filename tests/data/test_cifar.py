"""The binary batches of CIFAR, on five-record files of the official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neurocl.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_COARSE_CLASSES, read_cifar
from neurocl.errors import UserError


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 32, 32), dtype=np.uint8)


def write_cifar10(folder: Path) -> None:
    for number, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        records = [bytes([(number + k) % 10]) + picture(10 * number + k).tobytes() for k in range(5)]
        (folder / name).write_bytes(b"".join(records))


def write_cifar100(folder: Path) -> None:
    for number, name in enumerate(["train.bin", "test.bin"]):
        records = [bytes([k, 99 - k]) + picture(10 * number + k).tobytes() for k in range(5)]
        (folder / name).write_bytes(b"".join(records))


def test_cifar10_batches_are_read_in_order_channel_first(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    dataset = read_cifar(tmp_path)
    assert dataset.name == "cifar10"
    assert dataset.train_images.shape == (25, 3, 32, 32)
    assert np.array_equal(dataset.train_images[7], picture(12))
    assert np.array_equal(dataset.test_images[4], picture(54))
    assert dataset.train_labels[:7].tolist() == [0, 1, 2, 3, 4, 1, 2]
    assert dataset.class_names == CIFAR10_CLASSES


def test_cifar100_has_coarse_and_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    fine, coarse = read_cifar(tmp_path), read_cifar(tmp_path, labels="coarse")
    assert fine.train_labels.tolist() == [99, 98, 97, 96, 95]
    assert coarse.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(fine.test_images[3], picture(13))
    assert (fine.class_names, coarse.class_names) == (CIFAR100_CLASSES, CIFAR100_COARSE_CLASSES)


def test_the_class_lists_are_complete_and_sorted() -> None:
    assert (len(CIFAR10_CLASSES), len(CIFAR100_CLASSES), len(CIFAR100_COARSE_CLASSES)) == (10, 100, 20)
    for names in (CIFAR10_CLASSES, CIFAR100_CLASSES, CIFAR100_COARSE_CLASSES):
        assert list(names) == sorted(set(names))


def test_a_cut_batch_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    batch = tmp_path / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin: 15364 bytes is not a whole number of records of 3073"):
        read_cifar(tmp_path)


def test_a_batch_cut_between_records_is_found_when_the_set_should_be_complete(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with pytest.raises(UserError, match=r"data_batch_1\.bin: 5 records, 10000 expected"):
        read_cifar(tmp_path, complete=True)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_2\.bin: no such file"):
        read_cifar(tmp_path)


def test_a_label_out_of_range_is_named_with_its_record(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    batch = bytearray((tmp_path / "test_batch.bin").read_bytes())
    batch[2 * 3073] = 10
    (tmp_path / "test_batch.bin").write_bytes(batch)
    with pytest.raises(UserError, match=r"test_batch\.bin: record 2 has label 10, out of range 0 to 9"):
        read_cifar(tmp_path)


@pytest.mark.parametrize(
    ("names", "archive"),
    [
        (("data_batch_1", "test_batch"), "cifar-10-binary.tar.gz"),
        (("train", "test", "meta"), "cifar-100-binary.tar.gz"),
    ],
)
def test_pickles_are_refused_with_the_binary_archive_named(
    tmp_path: Path, names: tuple[str, ...], archive: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x03.")
    with pytest.raises(UserError, match=rf"neurocl reads no pickles, take the binary archive {archive}"):
        read_cifar(tmp_path)


def test_an_empty_folder_and_coarse_cifar10_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no CIFAR batches"):
        read_cifar(tmp_path)
    write_cifar10(tmp_path)
    with pytest.raises(UserError, match="no coarse labels"):
        read_cifar(tmp_path, labels="coarse")
