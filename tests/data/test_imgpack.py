"""The imgpack container: pictures decode once, and damage is named."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neurocl.data import imgpack
from neurocl.data.imgpack import is_imgpack, read_imgpack, read_imgpack_dataset, read_imgpack_labels
from neurocl.errors import UserError


def png(pixels: np.ndarray) -> bytes:
    """Lossless, so that pixels can be compared; the container allows any format that Pillow reads."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_pack(path: Path, pictures: list[np.ndarray], **changes: Any) -> None:
    bodies = [png(picture) for picture in pictures]
    prefix = bodies[0][:8]  # the PNG signature
    rest = [body[len(prefix) :] for body in bodies]
    arrays: dict[str, Any] = {"class_names": np.array(["a", "b"])}
    for split in ("train", "test"):
        arrays |= {
            f"{split}_prefix": np.frombuffer(prefix, np.uint8),
            f"{split}_blob": np.frombuffer(b"".join(rest), np.uint8),
            f"{split}_offsets": np.cumsum([0, *map(len, rest)]).astype(np.uint32),
            f"{split}_labels": np.arange(len(pictures), dtype=np.uint8) % 2,
        }
    np.savez(path, **(arrays | changes))


def pictures(*shape: int, count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return tmp_path / "toy.npz"


def test_colour_pictures_come_back_channel_first(pack: Path) -> None:
    originals = pictures(6, 5, 3)
    write_pack(pack, originals)
    assert is_imgpack(pack)
    assert np.array_equal(read_imgpack(pack, "train"), np.stack(originals).transpose(0, 3, 1, 2))


def test_grey_pictures_have_one_channel(pack: Path) -> None:
    originals = pictures(6, 5)
    write_pack(pack, originals)
    assert np.array_equal(read_imgpack(pack, "test"), np.stack(originals)[:, None])


def test_the_decoded_array_is_kept_under_the_digest_of_the_file(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pack(pack, pictures(6, 5, 3))
    first = read_imgpack(pack, "train")
    digest = hashlib.sha256(pack.read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / "cache" / "decoded").iterdir()] == [f"{digest}-train.npy"]
    monkeypatch.setattr(imgpack, "_decode", None)
    second = read_imgpack(pack, "train")
    assert np.array_equal(first, second)
    assert isinstance(second, np.memmap)


def test_writing_to_the_array_does_not_reach_the_cache(pack: Path) -> None:
    write_pack(pack, pictures(6, 5, 3))
    first = read_imgpack(pack, "train")
    before = first.copy()
    first[:] = 0
    assert np.array_equal(read_imgpack(pack, "train"), before)


def test_a_damaged_picture_is_named_and_nothing_is_kept(pack: Path, tmp_path: Path) -> None:
    write_pack(pack, pictures(6, 5, 3))
    with np.load(pack) as archive:
        blob = archive["train_blob"].copy()
        offsets = archive["train_offsets"]
    blob[offsets[1] : offsets[2]] = 0
    write_pack(pack, pictures(6, 5, 3), train_blob=blob)
    with pytest.raises(UserError, match="train picture 1 does not decode"):
        read_imgpack(pack, "train")
    assert list((tmp_path / "cache" / "decoded").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_offsets": np.array([0, 10, 5], np.uint32)}, "train_offsets leave"),
        ({"train_offsets": np.array([0, 10, 10**6], np.uint32)}, "train_offsets leave"),
        ({"train_blob": np.zeros(10, np.int16)}, "not an imgpack"),
    ],
)
def test_offsets_and_types_are_checked(pack: Path, changes: dict[str, Any], message: str) -> None:
    write_pack(pack, pictures(6, 5, 3), **changes)
    with pytest.raises(UserError, match=message):
        read_imgpack(pack, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.array([0, 1, 2], np.uint8)}, "train_labels must lie in 0 to 1, found 2"),
        ({"train_labels": np.array([0.0, 1.0, 1.0])}, "train_labels must be integers"),
        ({"class_names": np.array([b"a", b"b"])}, "class_names must be text"),
    ],
)
def test_labels_are_checked(pack: Path, changes: dict[str, Any], message: str) -> None:
    write_pack(pack, pictures(6, 5, 3), **changes)
    with pytest.raises(UserError, match=message):
        read_imgpack_labels(pack, "train")


def test_pictures_of_different_sizes_are_refused(pack: Path) -> None:
    write_pack(pack, [*pictures(6, 5, 3, count=1), *pictures(6, 6, 3, count=1)])
    with pytest.raises(UserError, match=r"train picture 1 has shape \[3, 6, 6\], the first one has \[3, 6, 5\]"):
        read_imgpack(pack, "train")


def test_more_labels_than_pictures_are_refused(pack: Path) -> None:
    write_pack(pack, pictures(6, 5, 3), train_labels=np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="3 pictures but 7 labels"):
        read_imgpack_dataset(pack, "toy")


def test_eurosat_decodes_to_its_published_mean(real_data: Callable[[str], Path]) -> None:
    dataset = read_imgpack_dataset(real_data("eurosat/eurosat64.npz"), "eurosat")
    assert dataset.train_images.shape == (3200, 3, 64, 64)
    assert np.bincount(dataset.test_labels).tolist() == [80] * 10
    mean = dataset.train_images.mean(axis=(0, 2, 3)) / 255
    assert mean == pytest.approx([0.3445, 0.3834, 0.4096], abs=1e-3)


@pytest.mark.slow
def test_cifar10_decodes_in_the_official_order(real_data: Callable[[str], Path]) -> None:
    dataset = read_imgpack_dataset(real_data("cifar10/cifar10.npz"), "cifar10")
    assert dataset.train_images.shape == (50_000, 3, 32, 32)
    assert dataset.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert dataset.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    mean = dataset.train_images.mean(axis=(0, 2, 3)) / 255
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-3)
