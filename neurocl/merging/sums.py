"""Sums over whole tensors that are shown in pieces, the same to the last bit however the tensor was cut.

Floating-point addition is not associative, so a running total would depend on where the cuts are. Here entries are
added in blocks whose borders are fixed, and the sums of the blocks are added exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 4096


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


def _fold(rows: Tensor) -> Tensor:
    """Sum of each row of [B, 4096]: halves are added until one entry is left.

    A reduction may add in another order on another device or in another shape; entry-wise additions cannot.
    """
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0].clone()
