"""Statistics of layers: named sums over data, with what they count, in one safetensors file.

A sum is keyed by its kind and by the name of the parameter it belongs to:

========  =====================================================  ==================  ================
kind      what is summed                                         shape               mean is over
========  =====================================================  ==================  ================
gram      x x^T over the rows x that reach a linear layer        [d, d] or diag [d]  rows (tokens)
fisher    squared gradient of the log-likelihood of one sample   the parameter's     samples
kfac_a    (1/R) sum over R rows of [x, 1] [x, 1]^T               [d + 1, d + 1]      samples
kfac_b    (1/R) sum over R rows of g g^T, g output gradients     [o, o]              samples
block     u u^T, u the gradient of one sample                    [d, d]              samples
========  =====================================================  ==================  ================

Sums of several machines, or of several parts of a data set, add up to the statistics of the whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neurocl.errors import RunError, UserError
from neurocl.registry import did_you_mean

Kind = Literal["gram", "fisher", "kfac_a", "kfac_b", "block"]
KINDS: tuple[str, ...] = get_args(Kind)
SCHEMA = 1
HEADER_KEY = "neurocl.statistics"


@dataclass(frozen=True)
class Sum:
    """One named sum.

    Attributes:
        total: the sum, in float64 while it is being made.
        num_samples: samples that went into it.
        num_rows: rows (tokens, image patches) that went into it.
    """

    total: Tensor
    num_samples: int
    num_rows: int


class Statistics:
    """Sums by kind and parameter name; see the module's table."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], Sum] = {}

    def has(self, kind: str, name: str) -> bool:
        """Whether there is a sum of that kind for that parameter."""
        return (kind, name) in self._sums

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Keys ``(kind, name)`` in the order in which they were added."""
        return iter(self._sums)

    def names(self, kind: str) -> list[str]:
        """Parameters that have a sum of this kind."""
        return [name for own, name in self._sums if own == kind]

    def sum(self, kind: str, name: str) -> Sum:
        """The sum with its counts.

        Raises:
            UserError: there is none of that kind and name.
        """
        if (kind, name) not in self._sums:
            hint = did_you_mean(name, self.names(kind))
            raise UserError(f"the statistics have no {kind} of {name!r}{hint}")
        return self._sums[kind, name]

    def mean(self, kind: str, name: str) -> Tensor:
        """The sum over its rows (``gram``) or samples (the others); zero where nothing was counted.

        A Gram matrix of which only the diagonal was kept comes back as a diagonal matrix [d, d].

        Raises:
            UserError: there is none of that kind and name.
        """
        entry = self.sum(kind, name)
        mean = entry.total / max(1, entry.num_rows if kind == "gram" else entry.num_samples)
        return torch.diag(mean) if kind == "gram" and mean.ndim == 1 else mean

    def add(self, kind: str, name: str, total: Tensor, *, num_samples: int = 0, num_rows: int = 0) -> None:
        """Add ``total`` and its counts to the sum of that kind and name.

        Raises:
            ValueError: an unknown kind.
            UserError: the sum that is there has another shape.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        old = self._sums.get((kind, name))
        if old is None:
            self._sums[kind, name] = Sum(total, num_samples, num_rows)
            return
        if old.total.shape != total.shape:
            raise UserError(
                f"cannot add the {kind} of {name!r}: shapes {list(old.total.shape)} and {list(total.shape)} differ"
            )
        both = old.total + total.to(old.total.device)
        self._sums[kind, name] = Sum(both, old.num_samples + num_samples, old.num_rows + num_rows)

    def __add__(self, other: Statistics) -> Statistics:
        """Sums and counts of both; neither is changed.

        Raises:
            UserError: sums of one name with different shapes.
        """
        return Statistics.merged([self, other])

    @classmethod
    def merged(cls, parts: Iterable[Statistics]) -> Statistics:
        """Sums and counts of all ``parts``, as if their data had been seen by one machine.

        Raises:
            UserError: sums of one name with different shapes.
        """
        result = cls()
        for part in parts:
            for (kind, name), entry in part._sums.items():
                result.add(kind, name, entry.total, num_samples=entry.num_samples, num_rows=entry.num_rows)
        return result

    def diagonal(self) -> Statistics:
        """The same with only the diagonal of every Gram matrix: d numbers per layer instead of d^2."""
        result = Statistics()
        for (kind, name), entry in self._sums.items():
            total = entry.total.diagonal().clone() if kind == "gram" and entry.total.ndim == 2 else entry.total
            result.add(kind, name, total, num_samples=entry.num_samples, num_rows=entry.num_rows)
        return result

    def save(self, path: Path | str, *, dtype: torch.dtype = torch.float64) -> None:
        """Write everything as one safetensors file, under a temporary name that is then renamed.

        Args:
            path: the file.
            dtype: ``torch.float64``, or ``torch.float32`` for half the size and 7 digits.
        Raises:
            ValueError: another dtype.
            RunError: the file cannot be written; what was there is intact.
        """
        if dtype not in (torch.float64, torch.float32):
            raise ValueError(f"statistics are stored as float64 or float32, not {dtype}")
        path = Path(path)
        tensors = {_key(*key): entry.total.detach().to("cpu", dtype).clone() for key, entry in self._sums.items()}
        counts = {_key(*key): [entry.num_samples, entry.num_rows] for key, entry in self._sums.items()}
        header = {HEADER_KEY: json.dumps({"schema": SCHEMA, "counts": counts})}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata=header)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot write {path}: {error}; what was saved before is intact") from None

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """Read a file that :meth:`save` wrote; numbers come back as float64.

        Raises:
            UserError: no such file, not statistics, or an entry with a wrong shape, count or value; it is named.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: {'a folder, not a file of statistics' if path.is_dir() else 'no such file'}")
        result = cls()
        try:
            with safe_open(str(path), framework="pt") as stream:
                counts = _counts(path, stream.metadata())
                keys = set(stream.keys())
                if keys != counts.keys():
                    odd = min(keys ^ counts.keys())
                    raise UserError(f"{path}: entry {odd!r} is in only one of the header and the data")
                for key in counts:
                    kind, name = _parsed(path, key)
                    total = stream.get_tensor(key)
                    _check(path, key, kind, total)
                    num_samples, num_rows = counts[key]
                    result.add(kind, name, total.double(), num_samples=num_samples, num_rows=num_rows)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from None
        return result


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"


def _parsed(path: Path, key: str) -> tuple[str, str]:
    kind, _, name = key.partition("/")
    if kind in KINDS and name:
        return kind, name
    raise UserError(f"{path}: entry {key!r} is not named KIND/PARAMETER with a kind of {', '.join(KINDS)}")


def _counts(path: Path, metadata: dict[str, str] | None) -> dict[str, tuple[int, int]]:
    """Samples and rows of every entry, from the header."""
    try:
        document: Any = json.loads((metadata or {})[HEADER_KEY])
        schema, raw = document["schema"], dict(document["counts"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a file of layer statistics (its header does not say so)") from None
    if schema != SCHEMA:
        raise UserError(f"{path}: statistics of schema {schema!r}, this version reads {SCHEMA}")
    for key, pair in raw.items():
        plain = isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        if not plain:
            raise UserError(f"{path}: entry {key!r}: counts must be two whole numbers from 0, got {pair!r}")
    return {key: (pair[0], pair[1]) for key, pair in raw.items()}


def _check(path: Path, key: str, kind: str, total: Tensor) -> None:
    if total.dtype not in (torch.float64, torch.float32):
        raise UserError(f"{path}: entry {key!r}: must be float64 or float32, got {total.dtype}")
    square = total.ndim == 2 and total.shape[0] == total.shape[1]
    if kind != "fisher" and not square and not (kind == "gram" and total.ndim == 1):
        raise UserError(f"{path}: entry {key!r}: must be a square matrix, got shape {list(total.shape)}")
    if not bool(torch.isfinite(total).all()):
        raise UserError(f"{path}: entry {key!r}: holds values that are not finite")
