"""The idx format of the MNIST family: one big-endian array in a file, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.errors import UserError

_UNSIGNED_BYTE = 0x08
_MAX_DIMENSIONS = 4
# deflate can't shrink data by more than this factor, so a larger declared size is a lie
_MAX_DEFLATE_RATIO = 1032

IDX_STEMS = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one idx file of unsigned bytes.

    The file is taken as gzip if its name ends in ``.gz`` or its first bytes say so. The size that the
    header declares is compared with the size of the file before memory is asked for.

    Returns: uint8 array of 1 to 4 dimensions, labels [N] or pictures [N, H, W].
    Raises:
        UserError: missing, cut or lengthened file, broken gzip, wrong magic number.
    Reference: the file format section of LeCun, Cortes and Burges, "The MNIST database".
    """
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if path.suffix == ".gz" and not zipped:
                raise UserError(f"{path}: not a gzip file, although its name ends in .gz")
            size = path.stat().st_size
            if not zipped:
                return _read_stream(raw, path, size)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _read_stream(cast(IO[bytes], stream), path, size * _MAX_DEFLATE_RATIO)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except EOFError as error:
        raise UserError(f"{path}: the gzip stream is truncated") from error
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def read_idx_folder(folder: Path, name: str, class_names: tuple[str, ...]) -> ArrayDataset:
    """Read the four files of an MNIST-like set, each plain or ``.gz``.

    Returns: pictures [N, 1, H, W] with their labels.
    Raises:
        UserError: a missing or damaged file, or a label without a class name.
    """
    images: dict[str, Images] = {}
    labels: dict[str, Labels] = {}
    for split in ("train", "test"):
        picture_file = idx_file(folder, IDX_STEMS[split, "images"])
        pictures = read_idx(picture_file)
        if pictures.ndim != 3:
            raise UserError(f"{picture_file}: holds no pictures (magic number 2051 expected)")
        label_file = idx_file(folder, IDX_STEMS[split, "labels"])
        targets = read_idx(label_file)
        if targets.ndim != 1:
            raise UserError(f"{label_file}: holds no labels (magic number 2049 expected)")
        if len(pictures) != len(targets):
            raise UserError(
                f"{label_file}: {len(targets)} labels, but {picture_file.name} has {len(pictures)} pictures"
            )
        if targets.size and targets.max() >= len(class_names):
            raise UserError(f"{label_file}: label {targets.max()} is outside 0 to {len(class_names) - 1}")
        images[split], labels[split] = pictures[:, None], targets.astype(np.int64)
    return ArrayDataset(name, images["train"], labels["train"], images["test"], labels["test"], class_names)


def idx_file(folder: Path, stem: str) -> Path:
    """The file of that stem in ``folder``, plain or gzipped; raises UserError when neither is there."""
    for candidate in (folder / stem, folder / f"{stem}.gz"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder}: neither {stem} nor {stem}.gz is there")


def _read_stream(stream: IO[bytes], path: Path, largest: int) -> NDArray[np.uint8]:
    header = stream.read(4)
    if len(header) < 4:
        raise UserError(f"{path}: truncated inside its header")
    zero, kind, num_dimensions = struct.unpack(">HBB", header)
    if zero != 0 or kind != _UNSIGNED_BYTE or not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise UserError(f"{path}: wrong magic number {header.hex()}, not an idx file of unsigned bytes")
    sizes = stream.read(4 * num_dimensions)
    if len(sizes) < 4 * num_dimensions:
        raise UserError(f"{path}: truncated inside its header")
    shape = struct.unpack(f">{num_dimensions}I", sizes)
    declared = math.prod(shape)
    if declared > largest:
        raise UserError(f"{path}: the header declares {declared} bytes, more than the file can hold")
    # one byte more than declared: whatever follows the array is found by the same read
    body = stream.read(declared + 1)
    if len(body) < declared:
        raise UserError(f"{path}: truncated, {len(body)} of {declared} bytes are there")
    if len(body) > declared:
        raise UserError(f"{path}: bytes follow the {declared} that the header declares")
    # a bytearray, so that the array can be written to like any other
    return np.frombuffer(bytearray(body), dtype=np.uint8, count=declared).reshape(shape)
