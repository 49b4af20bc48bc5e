"""Reading named arrays out of an npz file that nobody vouches for: no pickles, no size taken on trust."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from neurocl.errors import UserError


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in ``path``, in file order.

    Raises:
        UserError: the file is missing or not an npz.
    """
    with _open(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_npz(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays ``names`` from an npz file.

    Every header is read and compared with the bytes that the archive holds before anything is
    allocated, and an array of Python objects is refused, since reading one means running a pickle.

    Raises:
        UserError: missing file, not an npz, missing array, object array, damaged or cut member.
    """
    arrays = {}
    with _open(path) as archive:
        held = archive.namelist()
        for name in names:
            if f"{name}.npy" not in held:
                found = ", ".join(member.removesuffix(".npy") for member in held[:12]) or "nothing"
                raise UserError(f"{path}: no array {name!r} in it (it holds {found})")
            try:
                _check_header(archive, path, name)
                with archive.open(f"{name}.npy") as stream:
                    arrays[name] = npy.read_array(stream, allow_pickle=False)
            except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{path}: array {name!r} is damaged ({error})") from error
            except (NotImplementedError, RuntimeError) as error:
                raise UserError(f"{path}: array {name!r} is packed in a way that is not read ({error})") from error
    return arrays


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an npz file ({error})") from error


def _check_header(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    size = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as stream:
        shape, dtype = _header(stream)
        if dtype.hasobject:
            raise UserError(f"{path}: array {name!r} holds Python objects; neurocl reads no pickles")
        declared = stream.tell() + math.prod(shape) * dtype.itemsize
    if declared != size:
        raise UserError(f"{path}: array {name!r} declares {declared} bytes but {size} are stored")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = reader(stream)
    return shape, dtype
