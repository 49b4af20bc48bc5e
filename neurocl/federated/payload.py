"""What travels between server and clients, named arrays and plain values, and its encoding to bytes and back.

Encoding, all numbers little-endian: a prefix of 16 bytes (magic ``NCLP``, then version, header length and header CRC-32
as unsigned 32-bit numbers), the header, zeros up to a multiple of 8, the body. The header is canonical JSON (ASCII,
sorted keys, no spaces): ``arrays``, a list of ``name``, ``dtype``, ``shape``, ``offset`` sorted by name; ``crc32`` of
the body; ``meta``. In the body each array begins at the next multiple of 8 after its predecessor, in C
order. There is exactly one encoding of a payload: a decoder refuses every other byte string.

Bytes from a client are untrusted: nothing is executed, no size is believed before it has been compared with the bytes
that are there, and a decoded array is a view of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.errors import RunError

Scalar = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]
Array = NDArray[Any]

MAX_BYTES = 2 << 30
# Parsed JSON takes up to some thirty times its text; this bounds what a hostile header can make us allocate.
MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 32
MAX_NAME_LENGTH = 512
#: beyond it a reply is taken for an accident or an attack
LARGEST_NUMBER = 10**18

_MAGIC = b"NCLP"
_VERSION = 1
_PREFIX = struct.Struct("<4sIII")
# The widest item type: every array of an aligned buffer is aligned.
_ALIGNMENT = 8
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}


class PayloadError(RunError):
    """A message that cannot be encoded, or bytes that are not one: the sender's reply is lost, the run may go on."""


@dataclass(frozen=True, eq=False)
class Payload:
    """One message or state. Both dictionaries are copied and sorted by name: their order is the same everywhere.

    Args:
        arrays: name to array; float16/32/64, int8/16/32/64, uint8 or bool. The arrays themselves are not copied.
        meta: name to bool, int (64 bits), finite float, string, or list of one of these types. NaN and infinity have
            no place in JSON: send such a number as a 0-d array, where :func:`check_finite` sees it.

    Raises:
        PayloadError: a name, type or value outside these.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    meta: dict[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.arrays, *self.meta):
            _check_name(name)
        for name in self.arrays:
            _check_array(name, self.arrays[name])
        object.__setattr__(self, "arrays", {name: self.arrays[name] for name in sorted(self.arrays)})
        object.__setattr__(self, "meta", {name: _plain(name, self.meta[name]) for name in sorted(self.meta)})


def _check_name(name: object) -> None:
    # Names end up in logs and on terminals: no control characters.
    if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()):
        raise PayloadError(
            f"a name in a message must be 1 to {MAX_NAME_LENGTH} printable characters, got {str(name)[:40]!r}"
        )


def _check_array(name: str, array: object) -> None:
    if isinstance(array, Tensor):
        cast = " after .float()" if array.dtype == torch.bfloat16 else ""
        raise PayloadError(f"array {name!r} is a torch tensor of {array.dtype}; use arrays_of(){cast}")
    if not isinstance(array, np.ndarray):
        raise PayloadError(f"array {name!r} must be a NumPy array, got {type(array).__name__}")
    if array.dtype.name not in _DTYPES:
        raise PayloadError(f"array {name!r} has type {array.dtype}; a message carries {', '.join(_DTYPES)}")
    if array.ndim > MAX_DIMENSIONS:
        raise PayloadError(f"array {name!r} has {array.ndim} dimensions, at most {MAX_DIMENSIONS} are allowed")


def _plain(name: str, value: object) -> Scalar:
    """The value with NumPy scalars turned into Python's, if it may travel in ``meta``."""
    items = [item.item() if isinstance(item, np.generic) else item for item in _as_list(value)]
    kinds = {type(item) for item in items}
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise PayloadError(f"meta {name!r} must be a bool, int, float, string or a list of one of these, got {found}")
    for item in items:
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise PayloadError(f"meta {name!r} holds an integer of more than 64 bits")
        if isinstance(item, float) and not math.isfinite(item):
            raise PayloadError(f"meta {name!r} is {item}; send a number that may be NaN or infinite as a 0-d array")
        if isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
            raise PayloadError(f"meta {name!r} holds half of a surrogate pair, which is no text")
    result: Any = items if isinstance(value, list) else items[0]
    return result  # type: ignore[no-any-return]


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def encode(payload: Payload) -> bytes:
    """The payload as bytes; equal payloads give equal bytes.

    Raises:
        PayloadError: arrays or values were put into the payload afterwards that it does not allow, or its header
            (names and meta) is larger than ``MAX_HEADER_BYTES``.
    """
    payload = Payload(payload.arrays, payload.meta)
    entries: list[dict[str, object]] = []
    body: list[memoryview | bytes] = []
    position, checksum = 0, 0
    for name, array in payload.arrays.items():
        padding = bytes(_aligned(position) - position)
        raw = np.ascontiguousarray(array, dtype=_DTYPES[array.dtype.name]).reshape(-1).view(np.uint8)
        position += len(padding)
        entries.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": position})
        for piece in (padding, raw.data):
            checksum = crc32(piece, checksum)
            body.append(piece)
        position += raw.size
    header = _canonical({"arrays": entries, "crc32": checksum, "meta": payload.meta})
    if len(header) > MAX_HEADER_BYTES:
        raise PayloadError(
            f"names and meta take {len(header)} bytes, at most {MAX_HEADER_BYTES} are allowed; use arrays"
        )
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(header), crc32(header))
    end = _PREFIX.size + len(header)
    return b"".join([prefix, header, bytes(_aligned(end) - end), *body])


def decode(data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES) -> Payload:
    """The payload that :func:`encode` turned into ``data``.

    Arrays are read-only views of ``data`` (which they keep alive); where ``data`` is not aligned in memory, copies.

    Raises:
        PayloadError: too large, cut short, changed on the way, or not written by :func:`encode`.
    """
    buffer = memoryview(data)
    if not buffer.c_contiguous:
        raise PayloadError("a message must be one contiguous buffer")
    if buffer.nbytes > max_bytes:
        raise PayloadError(f"message of {buffer.nbytes} bytes, at most {max_bytes} are allowed")
    buffer = buffer.cast("B") if buffer.nbytes else memoryview(b"")
    header, start = _read_header(buffer)
    body = buffer[start:]
    entries = list(_checked_entries(header["arrays"], len(body)))
    if crc32(body) != header["crc32"]:
        raise PayloadError("message was changed on the way: checksum of the arrays does not agree")
    arrays: dict[str, Array] = {}
    end = 0
    for name, dtype, shape, offset in entries:
        count = math.prod(shape)
        if any(body[end:offset]):
            raise PayloadError(f"bytes before array {name!r} are not zero")
        end = offset + count * dtype.itemsize
        if dtype == np.bool_ and (np.frombuffer(body, np.uint8, count, offset) > 1).any():
            raise PayloadError(f"array {name!r} of type bool holds bytes other than 0 and 1")
        view = np.frombuffer(body, dtype, count, offset).reshape(shape) if count else np.empty(shape, dtype)
        if not view.flags.aligned:
            view = view.copy()
        view.flags.writeable = False
        arrays[name] = view
    return Payload(arrays, header["meta"])


def _read_header(buffer: memoryview) -> tuple[dict[str, Any], int]:
    """The parsed header with its three keys, and where the body starts."""
    if len(buffer) < _PREFIX.size:
        raise PayloadError(f"message cut short: {len(buffer)} bytes")
    magic, version, length, checksum = _PREFIX.unpack_from(buffer)
    if magic != _MAGIC:
        raise PayloadError("not a message of neurocl: wrong first bytes")
    if version != _VERSION:
        raise PayloadError(f"message of version {version}, this neurocl reads version {_VERSION}")
    end = _PREFIX.size + length
    start = _aligned(end)
    if length > MAX_HEADER_BYTES:
        raise PayloadError(f"header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if start > len(buffer):
        raise PayloadError(f"message cut short: {len(buffer)} bytes, its header ends at {start}")
    text = bytes(buffer[_PREFIX.size : end])
    if crc32(text) != checksum or any(buffer[end:start]):
        raise PayloadError("message was changed on the way: checksum of the header does not agree")
    try:
        header = json.loads(text.decode("ascii"))
        # Repeated keys, spaces, NaN and numbers written in another way do not survive the comparison.
        canonical = _canonical(header) == text
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise PayloadError("header is not canonical JSON")
    if not (
        isinstance(header, dict)
        and header.keys() == {"arrays", "crc32", "meta"}
        and isinstance(header["arrays"], list)
        and type(header["crc32"]) is int
        and isinstance(header["meta"], dict)
    ):
        raise PayloadError("header must hold exactly a list arrays, a number crc32 and a mapping meta")
    return header, start


def _checked_entries(entries: list[Any], body_bytes: int) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...], int]]:
    """Name, type, shape and offset of each array, in order, without gaps or overlaps, filling the body exactly."""
    end = 0
    previous = ""
    for entry in entries:
        if not (isinstance(entry, dict) and entry.keys() == {"name", "dtype", "shape", "offset"}):
            raise PayloadError("an array of a message needs exactly name, dtype, shape and offset")
        name, code, shape, offset = entry["name"], entry["dtype"], entry["shape"], entry["offset"]
        _check_name(name)
        if name <= previous:
            raise PayloadError(f"array {name!r} is repeated or not in the order of names")
        dtype = _DTYPES.get(code) if isinstance(code, str) else None
        if dtype is None:
            raise PayloadError(f"array {name!r} has type {str(code)[:40]!r}; a message carries {', '.join(_DTYPES)}")
        if not (
            isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(size) is int and 0 <= size < 2**63 for size in shape)
        ):
            raise PayloadError(f"array {name!r}: shape must be at most {MAX_DIMENSIONS} sizes of 0 or more")
        # Also with a 0 among them the other sizes must be ones that an array can have.
        if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
            raise PayloadError(f"array {name!r}: a shape of this size is impossible")
        if type(offset) is not int or offset != _aligned(end):
            raise PayloadError(f"array {name!r} must begin at byte {_aligned(end)} of the body")
        end = offset + math.prod(shape) * dtype.itemsize
        if end > body_bytes:
            raise PayloadError(f"message cut short: array {name!r} ends at byte {end} of {body_bytes}")
        previous = name
        yield name, dtype, tuple(shape), offset
    if end != body_bytes:
        raise PayloadError(f"{body_bytes - end} bytes follow the last array")


def num_bytes(payload: Payload) -> int:
    """What a message costs by the protocol: size times item size of its arrays plus the canonical JSON of its meta.

    Free of the encoding's own overhead (names, shapes, padding), so that figures of methods and papers compare.
    """
    return sum(array.nbytes for array in payload.arrays.values()) + len(_canonical(payload.meta))


def check_finite(payload: Payload) -> str | None:
    """Name of the first array (by name) that holds NaN or infinity, None if all numbers are finite."""
    for name, array in payload.arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return name
    return None


def check_bounded(payload: Payload) -> str | None:
    """Name of the first array or number of ``meta`` beyond ``LARGEST_NUMBER``, None if there is none.

    Sums, squares and products of larger numbers overflow in float32 or int64, and a server's state with them.
    """
    for name, array in payload.arrays.items():
        # Not abs, under which the smallest integer stays negative.
        if array.size and array.dtype != np.bool_ and (array.max() > LARGEST_NUMBER or array.min() < -LARGEST_NUMBER):
            return name
    for name, value in payload.meta.items():
        if any(not isinstance(item, str) and abs(item) > LARGEST_NUMBER for item in _as_list(value)):  # type: ignore[arg-type]
            return name
    return None


def tensors(payload: Payload, prefix: str = "") -> dict[str, Tensor]:
    """The arrays whose names begin with ``prefix``, as tensors of their own memory, under their names without it."""
    return {
        name.removeprefix(prefix): torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        for name, array in payload.arrays.items()
        if name.startswith(prefix)
    }


def arrays_of(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Array]:
    """Tensors as arrays of their own memory, named with ``prefix`` in front; the inverse of :func:`tensors`.

    Raises:
        PayloadError: a tensor of a type that no message carries, such as bfloat16.
    """
    arrays = {}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _DTYPES:
            raise PayloadError(f"tensor {name!r} is {kind}, which no message carries; cast it first, as with .float()")
        arrays[prefix + name] = tensor.detach().cpu().contiguous().numpy().copy()
    return arrays
