"""DualGPM: which input directions of a linear layer earlier tasks need, in a basis of at most half their number.

``d`` inputs of the layer, ``m`` vectors of the basis, ``r`` rank of an adapter; Q [d, d] the Gram matrix of the inputs,
of any scale: directions and shares of energy do not depend on it.

Reference: Liang and Li, "InfLoRA: interference-free low-rank adaptation for continual learning", CVPR 2024, arXiv
2404.00228; Liang and Li, "Adaptive plasticity improvement for continual learning", CVPR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Energy = Literal["squared", "eigenvalues"]

# What Gram matrices in float32 say below this share of their largest singular value is rounding.
SMALLEST_SHARE = 1e-7


@dataclass(frozen=True)
class Memory:
    """The protected space of a layer's inputs.

    Attributes:
        basis: orthonormal columns, float64 [d, m].
        complement: the basis spans what is still free, and everything else is protected.
    """

    basis: Tensor
    complement: bool = False

    @classmethod
    def empty(cls, num_inputs: int) -> Memory:
        """Before the first task: nothing is protected."""
        return cls(torch.zeros(num_inputs, 0, dtype=torch.float64))

    @property
    def projector(self) -> Tensor:
        """P [d, d], onto the protected space."""
        span = self.basis @ self.basis.T
        return torch.eye(len(span), dtype=span.dtype) - span if self.complement else span

    @property
    def num_protected(self) -> int:
        """Dimensions of the protected space."""
        num_inputs, size = self.basis.shape
        return num_inputs - size if self.complement else size


def threshold(first: float, last: float, task: int, num_tasks: int) -> float:
    """The share of a task's energy that is protected, rising from ``first`` towards ``last``, which is not reached."""
    return first + (last - first) * task / num_tasks


def free_directions(gram: Tensor, memory: Memory, rank: int) -> Tensor:
    """The main directions of the inputs outside the protected space: the input side of an adapter.

    The leading left singular vectors of Q - P Q. Where fewer than ``rank`` are left, the other rows are zero: whatever
    a decomposition answers there may lie in the protected space.

    Args:
        gram: Q, [d, d].
        memory: what is protected.
        rank: r.
    Returns: rows orthonormal or zero, float64 [r, d].
    """
    gram = gram.double()
    rows = torch.zeros(rank, len(gram), dtype=torch.float64)
    projector = memory.projector
    left, values, _ = torch.linalg.svd(gram - projector @ gram)
    found = left[:, :rank][:, values[:rank] > SMALLEST_SHARE * torch.linalg.matrix_norm(gram, 2)]
    # Vectors of small singular values are orthogonal to P up to rounding over that value only.
    rows[: found.shape[1]] = torch.linalg.qr(found - projector @ found).Q.T
    return rows


def remembered(memory: Memory, gram: Tensor, share: float, *, energy: Energy = "squared") -> Memory:
    """The memory after a task.

    Args:
        memory: before it.
        gram: Q of the task, symmetric [d, d].
        share: of its energy that is protected afterwards, 0 to 1. In the first task the direction that would cross the
            threshold is left out, as published, but for one that is always protected.
        energy: of a direction, its singular value of Q squared, as published, or as it is, which are the squares of the
            inputs themselves and let the memory grow faster.
    Returns: the protected space with the task's main directions; of its two bases, the one that is not the larger.
    """
    gram = gram.double()
    projector = memory.projector
    left, values, _ = torch.linalg.svd(gram - projector @ gram)
    power = 2 if energy == "squared" else 1
    total = torch.linalg.svdvals(gram).pow(power).sum()
    excited = int((values > SMALLEST_SHARE * torch.linalg.matrix_norm(gram, 2)).sum())
    if not excited:
        return memory
    shares = values.pow(power) / total
    count = min(_count(memory, shares, share), excited)
    added = left[:, :count]
    if memory.complement:
        # Left singular vectors of the rest of the free basis: the leading ones span what is still free.
        rest = torch.linalg.svd(memory.basis - added @ (added.T @ memory.basis), full_matrices=False).U
        return Memory(_orthonormal(rest[:, : max(0, memory.basis.shape[1] - count)]), complement=True)
    num_inputs = len(gram)
    basis = _orthonormal(torch.cat([memory.basis, added], dim=1)[:, :num_inputs])
    if 2 * basis.shape[1] > num_inputs or (not memory.num_protected and 2 * count >= num_inputs):
        outside = torch.linalg.svd(basis, full_matrices=True).U[:, basis.shape[1] :]
        return Memory(_orthonormal(outside), complement=True)
    return Memory(basis)


def _count(memory: Memory, shares: Tensor, share: float) -> int:
    """How many of the directions outside the protected space, by descending share of energy, become protected."""
    if share >= 1:
        return len(shares)
    if not memory.num_protected:
        return max(1, int((shares.cumsum(0) < share).sum()))
    # What is left outside before each direction is taken.
    outside = shares.sum() - shares.cumsum(0) + shares
    if memory.complement:
        return _leading(outside >= 1 - share)
    return _leading(1 - outside < share)


def _leading(true: Tensor) -> int:
    """How many entries are true before the first that is not."""
    return int(true.long().cumprod(0).sum())


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q if columns.shape[1] else columns
