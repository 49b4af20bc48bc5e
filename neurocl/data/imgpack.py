"""The imgpack container: many small JPEG or WebP pictures in one npz, decoded once and kept in the cache."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.data.digest import file_digest
from neurocl.data.locate import cache_dir
from neurocl.data.npz import npz_names, read_npz
from neurocl.errors import UserError

# the largest picture side that the container is meant for; also stops decompression bombs
_MAX_SIDE = 4096


def is_imgpack(path: Path) -> bool:
    """Whether an npz file has the arrays of a train split in this container."""
    return {"train_prefix", "train_blob", "train_offsets", "train_labels"} <= set(npz_names(path))


def read_imgpack(path: Path, split: str) -> Images:
    """Decode all pictures of one split.

    The decoded array is kept as ``.npy`` under the cache folder, named by the sha256 of the npz, and is
    memory-mapped copy-on-write from there; the file appears under its name only when it is complete.

    Returns: uint8 [N, C, H, W], C is 1 for grey pictures and 3 for the others.
    Raises:
        UserError: not an imgpack, offsets that leave the blob, a picture that does not decode or
            differs in size from the first.
    """
    folder = cache_dir() / "decoded"
    kept = folder / f"{file_digest(path)}-{split}.npy"
    with contextlib.suppress(OSError, ValueError):
        return np.load(kept, mmap_mode="c", allow_pickle=False)  # type: ignore[no-any-return]
    encoded = _encoded(path, split)
    first = _decode(path, split, 0, encoded[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{kept.stem}.", suffix=".tmp", dir=folder)
        os.close(handle)
    except OSError as error:
        raise UserError(
            f"{folder}: decoded pictures cannot be kept there ({error}); set NEUROCL_CACHE to a folder "
            "that can be written"
        ) from error
    try:
        decoded = open_memmap(name, mode="w+", dtype=np.uint8, shape=(len(encoded), *first.shape))
        for index, data in enumerate(encoded):
            picture = _decode(path, split, index, data)
            if picture.shape != first.shape:
                raise UserError(
                    f"{path}: {split} picture {index} has shape {list(picture.shape)}, the first one has "
                    f"{list(first.shape)}"
                )
            decoded[index] = picture
        decoded.flush()
        del decoded
        os.replace(name, kept)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return np.load(kept, mmap_mode="c", allow_pickle=False)  # type: ignore[no-any-return]


def read_imgpack_labels(path: Path, split: str) -> tuple[Labels, tuple[str, ...]]:
    """The labels of a split, int64 [N], and the names of the K classes.

    Raises:
        UserError: not an imgpack, or a label without a class name.
    """
    arrays = read_npz(path, [f"{split}_labels", "class_names"])
    labels, names = arrays[f"{split}_labels"], arrays["class_names"]
    if labels.dtype.kind not in "ui" or labels.ndim != 1:
        raise UserError(f"{path}: {split}_labels must be integers [N], got {labels.dtype} {labels.shape}")
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UserError(f"{path}: class_names must be text [K], got {names.dtype} {names.shape}")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise UserError(f"{path}: {split}_labels must lie in 0 to {len(names) - 1}, found {labels.max()}")
    return labels.astype(np.int64), tuple(str(name) for name in names)


def read_imgpack_dataset(path: Path, name: str) -> ArrayDataset:
    """Read the ``train`` and ``test`` splits of a container as one data set."""
    train_labels, class_names = read_imgpack_labels(path, "train")
    test_labels, _ = read_imgpack_labels(path, "test")
    return ArrayDataset(
        name,
        read_imgpack(path, "train"),
        train_labels,
        read_imgpack(path, "test"),
        test_labels,
        class_names,
    )


def _encoded(path: Path, split: str) -> list[bytes]:
    arrays = read_npz(path, [f"{split}_prefix", f"{split}_blob", f"{split}_offsets"])
    prefix, blob = arrays[f"{split}_prefix"], arrays[f"{split}_blob"]
    offsets: NDArray[np.int64] = arrays[f"{split}_offsets"].astype(np.int64)
    if prefix.dtype != np.uint8 or blob.dtype != np.uint8 or offsets.ndim != 1 or len(offsets) < 2:
        raise UserError(f"{path}: {split} split is not an imgpack (uint8 prefix and blob, offsets [N + 1])")
    if offsets[0] < 0 or offsets[-1] > blob.size or (np.diff(offsets) < 0).any():
        raise UserError(f"{path}: {split}_offsets leave the {blob.size} bytes of {split}_blob")
    head, data = prefix.tobytes(), blob.tobytes()
    return [head + data[start:end] for start, end in itertools.pairwise(offsets)]


def _decode(path: Path, split: str, index: int, data: bytes) -> Images:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "WEBP", "PNG")) as picture:
            if max(picture.size) > _MAX_SIDE:
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels, more than {_MAX_SIDE} a side")
            grey = picture.mode in ("1", "L")
            pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: {split} picture {index} does not decode ({error})") from error
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))
