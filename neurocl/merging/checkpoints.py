"""Model files as sources: Hugging Face folders and bare safetensors, read by position, never as a pickle.

Slices are read with ``pread`` into one reused buffer. A memory map would be shorter, but the pages it touches count as
the process's memory: a merge that needs 200 MB then shows the size of all its inputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurocl.errors import UserError
from neurocl.merging.parameters import TensorSpec
from neurocl.runs import read_json

MAX_HEADER_BYTES = 100 << 20
MAX_OPEN_FILES = 16
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX_NAME = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Placed:
    """Where one tensor lies: its file and the byte at which it begins."""

    spec: TensorSpec
    file: Path
    begin: int


def read_header(path: Path) -> tuple[dict[str, Placed], dict[str, str]]:
    """Tensors of a safetensors file, in the order of their bytes, and its metadata; no tensor is read.

    Raises:
        UserError: not a safetensors file, a damaged header, or a file cut short; the message names file and tensor.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= MAX_HEADER_BYTES or 8 + length > size:
                raise UserError(f"{path}: not a safetensors file, or its header is cut off")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file (its header is not a table)")
    metadata = header.pop("__metadata__", {})
    placed = {}
    for name, entry in header.items():
        placed[name] = _placed(path, name, entry, 8 + length, size)
    ordered = dict(sorted(placed.items(), key=lambda item: (item[1].begin, item[0])))
    end, previous = 8 + length, ""
    for name, place in ordered.items():
        if place.begin < end:
            raise UserError(f"{path}: tensor {name!r} overlaps {previous or 'the header'!r}")
        end, previous = place.begin + place.spec.nbytes, name
    strings = {str(key): value for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    return ordered, {key: value for key, value in strings.items() if isinstance(value, str)}


def _placed(path: Path, name: str, entry: Any, data_start: int, size: int) -> Placed:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: the header entry of tensor {name!r} is damaged") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has type {str(dtype)[:40]!r}, which cannot be merged")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 60 for n in (*shape, begin, end)):
        raise UserError(f"{path}: the header entry of tensor {name!r} is damaged")
    spec = TensorSpec(DTYPES[dtype], tuple(shape))
    if math.prod(shape) * spec.dtype.itemsize != end - begin:
        raise UserError(f"{path}: tensor {name!r} of shape {shape} does not fill its {end - begin} bytes")
    if data_start + end > size:
        raise UserError(
            f"{path}: truncated: tensor {name!r} ends at byte {data_start + end}, the file has only {size} bytes"
        )
    return Placed(spec, path, data_start + begin)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model: itself, the shards that an index names, or the one file of a folder.

    Raises:
        UserError: nothing there, only pickles, or an index that names files which are missing.
    """
    if path.is_file():
        if path.suffix in PICKLES:
            raise UserError(f"{path}: a pickle, which can run code when read; save the model as safetensors first")
        return [path]
    if not path.is_dir():
        remote = "://" in str(path) or ":/" in str(path) or str(path).count("/") <= 1
        hint = "; models are local folders or files, download it first" if remote and not path.suffix else ""
        raise UserError(f"{path}: no such file or folder{hint}")
    index = path / INDEX_NAME
    if index.is_file():
        document = read_json(index)
        names = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index}: no table weight_map of tensor names to files")
        files = [path / Path(name).name for name in dict.fromkeys(names.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{path}: the shard {missing[0]} is missing ({len(missing)} of {len(files)} are)")
        return files
    found = sorted(path.glob("*.safetensors"))
    if (path / "model.safetensors") in found:
        return [path / "model.safetensors"]
    if len(found) == 1:
        return found
    if found:
        raise UserError(f"{path}: {len(found)} safetensors files but no {INDEX_NAME}; name the file")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{path / pickles[0]}: a pickle, which can run code when read; save the model as safetensors first"
        )
    raise UserError(f"{path}: no safetensors file in that folder")


@dataclass
class FileSource:
    """A model on disk, one or several safetensors files.

    Attributes:
        label: the path as the user gave it.
        placed: where every tensor lies.
        metadata: of the first file.
        digests: SHA-256 of each tensor's bytes, filled while ``hashing`` is on as tensors are read from end to end.
    """

    label: str
    placed: dict[str, Placed]
    metadata: dict[str, str]
    hashing: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    _descriptors: dict[Path, int] = field(default_factory=dict)
    _buffer: bytearray = field(default_factory=bytearray)
    _hasher: Any = None
    _hashed: tuple[str, int] = ("", 0)  # the tensor at work and how many of its elements the hasher has seen

    def __post_init__(self) -> None:
        self._tensors = {name: place.spec for name, place in self.placed.items()}

    @classmethod
    def open(cls, path: Path) -> FileSource:
        """Read the headers of a model.

        Args:
            path: a safetensors file, or a folder with one or with shards and an index.

        Raises:
            UserError: see :func:`weight_files` and :func:`read_header`; a tensor stored twice; a shard without one
                that the index says it has.
        """
        files = weight_files(path)
        placed: dict[str, Placed] = {}
        metadata: dict[str, str] = {}
        for count, file in enumerate(files):
            found, described = read_header(file)
            twice = placed.keys() & found.keys()
            if twice:
                raise UserError(f"{file}: tensor {min(twice)!r} is stored in another shard too")
            placed.update(found)
            metadata = metadata if count else described
        index = path / INDEX_NAME
        if path.is_dir() and index.is_file():
            for name, file_name in read_json(index)["weight_map"].items():
                if name not in placed or placed[name].file.name != Path(file_name).name:
                    raise UserError(f"{path / file_name}: tensor {name!r} is missing from it, the index promises it")
        if not placed:
            raise UserError(f"{path}: holds no tensors")
        return cls(str(path), placed, metadata)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        return self._tensors

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a flattened tensor; valid until the next read.

        Raises:
            UserError: the file got shorter since its header was read, or cannot be read.
        """
        place = self.placed[name]
        width = place.spec.dtype.itemsize
        count = (stop - start) * width
        if count == 0:
            return torch.empty(0, dtype=place.spec.dtype)
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        view = memoryview(self._buffer)[:count]
        read, begin = 0, place.begin + start * width
        while read < count:
            try:
                got = os.preadv(self._descriptor(place.file), [view[read:]], begin + read)
            except OSError as error:
                raise UserError(f"{place.file}: cannot read tensor {name!r}: {error.strerror}") from None
            if got == 0:
                raise UserError(f"{place.file}: truncated: tensor {name!r} is not complete")
            read += got
        if self.hashing and name not in self.digests:
            self._hash(name, view, start, stop)
        return torch.frombuffer(view, dtype=place.spec.dtype)

    def _hash(self, name: str, view: memoryview, start: int, stop: int) -> None:
        # an adapter, or a model that lacks a tensor, makes the base read every slice more than once
        if start == 0 and self._hashed[0] != name:
            self._hasher, self._hashed = hashlib.sha256(), (name, 0)
        if self._hashed != (name, start):
            return
        self._hasher.update(view)
        self._hashed = (name, stop)
        if stop == self._tensors[name].numel:
            self.digests[name] = self._hasher.hexdigest()

    def digest(self, known: Mapping[str, str]) -> str:
        """:func:`content_digest` of the whole model; tensors whose digest is not ``known`` are read now."""
        digests = dict(known)
        for name, spec in self._tensors.items():
            if name not in digests:
                digests[name] = self._digest_of(name, spec)
        return content_digest(self._tensors, digests)

    def _digest_of(self, name: str, spec: TensorSpec) -> str:
        digest, size = hashlib.sha256(), 1 << 22
        for start in range(0, spec.numel, size):
            digest.update(self.read(name, start, min(spec.numel, start + size)).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            while len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes, sizes and modification times: changes when a file was replaced."""
        digest = hashlib.sha256()
        for file in dict.fromkeys(place.file for place in self.placed.values()):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name, spec in self._tensors.items():
            digest.update(f"{name} {spec.dtype} {spec.shape}\n".encode())
        return digest.hexdigest()


def content_digest(tensors: Mapping[str, TensorSpec], digests: Mapping[str, str]) -> str:
    """SHA-256 over the sorted (name, type, shape, SHA-256 of the bytes): the same for every way of sharding a model."""
    total = hashlib.sha256()
    for name in sorted(digests):
        spec = tensors[name]
        total.update(f"{name} {DTYPE_NAMES[spec.dtype]} {list(spec.shape)} {digests[name]}\n".encode())
    return total.hexdigest()


def header_bytes(tensors: Iterable[tuple[str, TensorSpec]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file that holds ``tensors`` in this order, padded to eight bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in tensors:
        table[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
