"""Sums over whole tensors that are shown in pieces, the same to the last bit however the tensor was cut.

Floating-point addition is not associative, so a running total would depend on where the cuts are. Here entries are
added in blocks whose borders are fixed, and the sums of the blocks are added exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 4096
PARTS = 8


class StreamSum:
    """Sum of values that arrive in order, in float64."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._rest = torch.empty(0, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in the next values, [n]."""
        values = values.to(torch.float64)
        if self._rest.numel():
            missing = min(BLOCK - self._rest.numel(), values.numel())
            self._rest = torch.cat([self._rest, values[:missing]])
            values = values[missing:]
            if self._rest.numel() == BLOCK:
                self._blocks.append(_fold(self._rest.view(1, BLOCK)))
                self._rest = self._rest[:0]
        whole = values.numel() - values.numel() % BLOCK
        if whole:
            self._blocks.append(_fold(values[:whole].view(-1, BLOCK)))
        if whole < values.numel():
            self._rest = values[whole:].clone()

    def total(self) -> float:
        """The sum of everything added so far."""
        last = torch.zeros(1, BLOCK, dtype=torch.float64)
        last[0, : self._rest.numel()] = self._rest
        return math.fsum(value for block in [*self._blocks, _fold(last)] for value in block.tolist())


class StreamProducts:
    """Scalar products of several vectors that arrive in order, in float64.

    Attributes:
        pairs: the pairs (i, j), i <= j, in the order of :meth:`totals`.
    """

    def __init__(self, num_vectors: int) -> None:
        self.pairs = [(first, second) for second in range(num_vectors) for first in range(second + 1)]
        self._blocks: list[Tensor] = []
        self._rest = torch.empty(num_vectors, 0, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Take in the next entries of every vector, [N, n]."""
        vectors = vectors.to(torch.float64)
        if self._rest.shape[1]:
            missing = min(BLOCK - self._rest.shape[1], vectors.shape[1])
            self._rest = torch.cat([self._rest.to(vectors), vectors[:, :missing]], dim=1)
            vectors = vectors[:, missing:]
            if self._rest.shape[1] == BLOCK:
                self._add_blocks(self._rest)
                self._rest = self._rest[:, :0]
        whole = vectors.shape[1] - vectors.shape[1] % BLOCK
        if whole:
            self._add_blocks(vectors[:, :whole])
        if whole < vectors.shape[1]:
            self._rest = vectors[:, whole:].clone()

    def _add_blocks(self, vectors: Tensor) -> None:
        """Products of whole blocks: eight parts of each are added up while they are in the cache, then folded."""
        count = len(vectors)
        parts = vectors.reshape(count, -1, PARTS, BLOCK // PARTS)
        totals = parts.new_empty(len(self.pairs), parts.shape[1], BLOCK // PARTS)
        product = parts.new_empty(count, parts.shape[1], BLOCK // PARTS)
        for second in range(count):
            begin = second * (second + 1) // 2
            own, scratch = totals[begin : begin + second + 1], product[: second + 1]
            torch.mul(parts[: second + 1, :, 0], parts[second, :, 0], out=own)
            for part in range(1, PARTS):
                own += torch.mul(parts[: second + 1, :, part], parts[second, :, part], out=scratch)
        self._blocks.append(_fold(totals))

    def totals(self) -> dict[tuple[int, int], float]:
        """Every scalar product over everything added so far."""
        rest = torch.zeros(len(self._rest), BLOCK, dtype=torch.float64, device=self._rest.device)
        rest[:, : self._rest.shape[1]] = self._rest
        last = torch.stack([_fold((rest[first] * rest[second]).view(1, BLOCK)) for first, second in self.pairs])
        rows = torch.cat([*self._blocks, last], dim=1).tolist()
        return {pair: math.fsum(row) for pair, row in zip(self.pairs, rows, strict=True)}


def _fold(rows: Tensor) -> Tensor:
    """Sums over the last axis of [..., a power of two]: halves are added until one entry is left.

    A reduction may add in another order on another device or in another shape; entry-wise additions cannot.
    """
    while rows.shape[-1] > 1:
        half = rows.shape[-1] // 2
        rows = rows[..., :half] + rows[..., half:]
    return rows[..., 0].clone()
