"""The idx format, whole and damaged in every way."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from neurocl.data.idx import IDX_STEMS, read_idx, read_idx_folder
from neurocl.errors import UserError

PIXELS = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_set(folder: Path, labels: list[int]) -> None:
    for split in ("train", "test"):
        (folder / IDX_STEMS[split, "images"]).write_bytes(idx(PIXELS))
        (folder / f"{IDX_STEMS[split, 'labels']}.gz").write_bytes(gzip.compress(idx(np.uint8(labels))))


def test_three_pictures_come_back_plain_and_gzipped(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(idx(PIXELS))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx(PIXELS), mtime=0))
    for name in ("plain", "zipped.gz"):
        assert np.array_equal(read_idx(tmp_path / name), PIXELS)


def test_the_magic_numbers_are_2051_and_2049() -> None:
    assert int.from_bytes(idx(PIXELS)[:4]) == 2051
    assert int.from_bytes(idx(PIXELS[0, 0])[:4]) == 2049


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", idx(PIXELS)[:-1], "truncated, 59 of 60 bytes"),
        ("a", idx(PIXELS) + b"!", "bytes follow the 60"),
        ("a", idx(PIXELS)[:9], "truncated inside its header"),
        ("a", b"", "truncated inside its header"),
        ("a", b"\x00\x00\x0d\x01" + bytes(8), "wrong magic number 00000d01"),
        ("a", b"PK\x03\x04" + bytes(8), "wrong magic number"),
        ("a", struct.pack(">HBB3I", 0, 8, 3, 60_000, 65_535, 65_535), "declares 257690173500000 bytes, more than"),
        (
            "a.gz",
            gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 60_000, 60_000, 60_000), mtime=0),
            "more than the file can",
        ),
        ("a.gz", idx(PIXELS), "not a gzip file"),
        ("a.gz", gzip.compress(idx(PIXELS), mtime=0)[:-12], "truncated"),
        ("a.gz", gzip.compress(idx(PIXELS), mtime=0)[:-8] + bytes(8), "cannot be read"),
        ("a.gz", gzip.compress(idx(PIXELS)[:-2], mtime=0), "truncated, 58 of 60 bytes"),
    ],
)
def test_damage_is_named_with_the_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"/{name}: .*{message}"):
        read_idx(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_idx(tmp_path / "absent")


def test_a_folder_of_four_files_becomes_a_set_with_one_channel(tmp_path: Path) -> None:
    write_set(tmp_path, [1, 0, 1])
    dataset = read_idx_folder(tmp_path, "toy", ("a", "b"))
    assert dataset.train_images.shape == (3, 1, 4, 5)
    assert np.array_equal(dataset.train_images[:, 0], PIXELS)
    assert dataset.test_labels.tolist() == [1, 0, 1]


def test_a_folder_with_wrong_files_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, [1, 0, 2])
    with pytest.raises(UserError, match=r"train-labels.*gz: label 2 is outside 0 to 1"):
        read_idx_folder(tmp_path, "toy", ("a", "b"))
    write_set(tmp_path, [1, 0])
    with pytest.raises(UserError, match=r"2 labels, but train-images-idx3-ubyte has 3 pictures"):
        read_idx_folder(tmp_path, "toy", ("a", "b"))
    (tmp_path / IDX_STEMS["train", "images"]).write_bytes(idx(PIXELS[0, 0]))
    with pytest.raises(UserError, match="holds no pictures"):
        read_idx_folder(tmp_path, "toy", ("a", "b"))
    (tmp_path / IDX_STEMS["train", "images"]).unlink()
    with pytest.raises(UserError, match=r"neither train-images-idx3-ubyte nor .*gz"):
        read_idx_folder(tmp_path, "toy", ("a", "b"))


def test_mnist_has_the_published_counts_and_mean(real_data: Callable[[str], Path]) -> None:
    dataset = read_idx_folder(real_data("mnist"), "mnist", tuple("0123456789"))
    assert dataset.train_images.shape == (60_000, 1, 28, 28)
    assert dataset.test_images.shape == (10_000, 1, 28, 28)
    assert dataset.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(dataset.train_labels).tolist() == counts
    assert dataset.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert dataset.train_images.std() / 255 == pytest.approx(0.3081, abs=5e-5)
