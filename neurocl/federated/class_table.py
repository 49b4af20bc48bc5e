"""What clients told of their classes: a row of count, mean and, where wanted, spread for each client and class.

``M`` rows, ``d`` features. The same rows travel (arrays ``class.*``, class numbers in meta) and are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.federated.method import Reply, Store
from neurocl.federated.payload import Payload, Scalar

Array = NDArray[Any]

COUNTS, MEANS, SPREADS, CLASSES = "class.counts", "class.means", "class.spreads", "classes"
#: of means times counts, where tables are added up
SUMS = "class.sums"
#: owner of rows that were added up over clients
NOBODY = -1


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Rows about classes.

    Attributes:
        clients: who told it, int64 [M].
        classes: class of each row, int64 [M].
        counts: samples behind it, int64 [M].
        means: of the features, float [M, d].
        spreads: variances [M, d], covariances [M, d, d], or nothing [M, 0].
    """

    clients: Array
    classes: Array
    counts: Array
    means: Array
    spreads: Array

    @classmethod
    def empty(cls, num_features: int, spread: Sequence[int] = (0,)) -> ClassTable:
        """No rows yet; ``spread`` is the shape of one row's spread."""
        none = np.zeros(0, dtype=np.int64)
        means, spreads = np.zeros((0, num_features), dtype=np.float32), np.zeros((0, *spread), dtype=np.float32)
        return cls(none, none, none, means, spreads)

    @classmethod
    def kept(cls, arrays: Mapping[str, Array], prefix: str) -> ClassTable:
        """The table that :meth:`store` put into a state."""
        return cls(*(arrays[prefix + name] for name in ("clients", "classes", "counts", "means", "spreads")))

    @classmethod
    def received(cls, replies: Sequence[Reply]) -> ClassTable:
        """The rows of replies, at least one, in their order."""
        tables = []
        for reply in replies:
            arrays, classes = reply.payload.arrays, np.array(reply.payload.meta[CLASSES], dtype=np.int64)
            spreads = arrays.get(SPREADS, np.zeros((len(classes), 0), dtype=np.float32))
            owners = np.full(len(classes), reply.client, dtype=np.int64)
            tables.append(cls(owners, classes, arrays[COUNTS].astype(np.int64), arrays[MEANS], spreads))
        return tables[0].joined(*tables[1:])

    def store(self, prefix: str) -> Store:
        """As arrays of a state."""
        return {prefix + name: value for name, value in vars(self).items()}

    def joined(self, *others: ClassTable) -> ClassTable:
        """The rows of all tables."""
        columns = zip(*(vars(table).values() for table in (self, *others)), strict=True)
        return ClassTable(*(np.concatenate(column) for column in columns))

    def rows(self, chosen: Array) -> ClassTable:
        """Some of the rows, by mask or numbers."""
        return ClassTable(*(value[chosen] for value in vars(self).values()))

    def of_class(self, number: int) -> ClassTable:
        """The rows about one class."""
        return self.rows(self.classes == number)

    def without(self, client: int) -> ClassTable:
        """The table as if a client had never said anything."""
        return self.rows(self.clients != client)

    def pooled(self) -> ClassTable:
        """One row for each class, without spread: nobody's, with the sum of the counts and the mean of all samples."""
        classes, inverse = np.unique(self.classes, return_inverse=True)
        counts = np.zeros(len(classes), dtype=np.int64)
        np.add.at(counts, inverse, self.counts)
        kind = self.means.dtype
        sums = np.zeros((len(classes), self.means.shape[1]), dtype=kind)
        np.add.at(sums, inverse, self.counts[:, None].astype(kind) * self.means)
        owners = np.full(len(classes), NOBODY, dtype=np.int64)
        none = np.zeros((len(classes), 0), dtype=kind)
        return ClassTable(owners, classes, counts, sums / counts[:, None].astype(kind), none)

    def float64(self) -> tuple[Tensor, Tensor]:
        """Counts [M] and means [M, d] for mathematics."""
        return torch.from_numpy(self.counts.astype(np.float64)), torch.from_numpy(self.means.astype(np.float64))


def told(
    classes: Tensor, counts: Tensor, means: Tensor, spreads: Tensor | None = None
) -> tuple[Store, dict[str, Scalar]]:
    """Rows as arrays and meta of a reply: 4 bytes for each number, the classes by number in meta.

    Args:
        classes: [M].
        counts: [M].
        means: [M, d].
        spreads: [M, ...].
    """
    arrays: Store = {COUNTS: counts.numpy().astype(np.int32), MEANS: means.numpy().astype(np.float32)}
    if spreads is not None:
        arrays[SPREADS] = spreads.numpy().astype(np.float32)
    return arrays, {CLASSES: [int(number) for number in classes]}


def dense_shapes(classes: range, num_features: int) -> dict[str, tuple[int, ...]]:
    """Of :func:`dense`."""
    return {COUNTS: (len(classes),), SUMS: (len(classes), num_features)}


def dense(reply: Payload, classes: range) -> Store:
    """The rows of a reply over all classes of the task, zeros where it has none: counts and sums of features."""
    rows = np.array(reply.meta[CLASSES], dtype=np.int64) - classes.start
    counts, means = reply.arrays[COUNTS].astype(np.float64), reply.arrays[MEANS].astype(np.float64)
    found = {name: np.zeros(shape) for name, shape in dense_shapes(classes, means.shape[1]).items()}
    found[COUNTS][rows], found[SUMS][rows] = counts, counts[:, None] * means
    return found


def undensed(total: Store, classes: range) -> tuple[Store, dict[str, Scalar]]:
    """The rows of a sum of :func:`dense` tables as arrays and meta of a reply, for classes that anybody has."""
    rows = np.flatnonzero(total[COUNTS] > 0)
    counts, sums = total[COUNTS][rows], total[SUMS][rows]
    numbers = torch.from_numpy(rows + classes.start)
    return told(numbers, torch.from_numpy(counts), torch.from_numpy(sums / counts[:, None]))


def row_objection(
    reply: Payload,
    classes: range,
    num_features: int,
    *,
    spread: Sequence[int] | None = None,
    min_count: int = 1,
    repeats: int = 1,
) -> str:
    """Why the rows of a reply cannot be used, or nothing.

    Args:
        reply: of a client.
        classes: of the task.
        num_features: d.
        spread: shape of one row's spread; None for none.
        min_count: least samples behind a row.
        repeats: rows that one class may have.
    """
    numbers = reply.meta.get(CLASSES)
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        return "classes must be a list of class numbers"
    if any(number not in classes for number in numbers):
        return f"classes must be among {classes.start} to {classes.stop - 1}"
    if max(Counter(numbers).values(), default=0) > repeats:
        return f"a class has more than {repeats} rows"
    shapes = {COUNTS: ("int32", (len(numbers),)), MEANS: ("float32", (len(numbers), num_features))}
    if spread is not None:
        shapes[SPREADS] = ("float32", (len(numbers), *spread))
    for name, (dtype, shape) in shapes.items():
        array = reply.arrays.get(name)
        if array is None:
            return f"{name} is missing"
        if array.dtype.name != dtype or array.shape != shape:
            return f"{name} is {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"
    if (reply.arrays[COUNTS] < min_count).any():
        return f"{COUNTS} holds a number below {min_count}"
    if spread is not None and len(spread) == 1 and (reply.arrays[SPREADS] < 0).any():
        return f"{SPREADS} holds a negative variance"
    return ""
