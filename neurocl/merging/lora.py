"""A LoRA layer, and the algebra of sums of them that never forms a dense product.

``T`` adapters, ``r`` rank of a layer, ``R`` sum of the ranks, ``o`` outputs, ``n`` inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurocl.errors import UserError

Weights = Sequence[float] | Tensor | None


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The low-rank update ``scaling * B @ A`` of one weight matrix.

    Attributes:
        A: [r, n].
        B: [o, r].
        scaling: ``lora_alpha / r``, or whatever the adapter divides by.

    Raises:
        ValueError: the factors do not fit together.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"factors A [r, n] and B [o, r] expected, got {tuple(self.A.shape)} and {tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.A)

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense update [o, n], computed in ``dtype``."""
        product: Tensor = self.B.to(dtype) @ self.A.to(dtype)
        return self.scaling * product


def weight_list(layers: Sequence[object], weights: Weights) -> list[float]:
    """One weight per adapter, 1 where none are given.

    Raises:
        UserError: there is no adapter, or another number of weights.
    """
    if not layers:
        raise UserError("no LoRA adapters to merge")
    values = [1.0] * len(layers) if weights is None else [float(weight) for weight in weights]
    if len(values) != len(layers):
        raise UserError(f"{len(values)} weights for {len(layers)} LoRA adapters")
    return values


def check_sizes(layers: Sequence[LoraLayer], *, same_rank: bool = False) -> None:
    """Raise UserError unless all layers update matrices of one size (and, if asked, are of one rank)."""
    sizes = sorted({(len(layer.B), layer.A.shape[1]) for layer in layers})
    if len(sizes) > 1:
        raise UserError(f"LoRA layers of different sizes cannot be merged: {', '.join(f'{o}x{n}' for o, n in sizes)}")
    ranks = sorted({layer.rank for layer in layers})
    if same_rank and len(ranks) > 1:
        raise UserError(
            f"merging the factors needs equal ranks, got {', '.join(map(str, ranks))}; lora-svd and lora-cat take any"
        )


def stacked_factors(layers: Sequence[LoraLayer], weights: Weights = None) -> tuple[Tensor, Tensor]:
    """A [R, n] and B [o, R] in float64 whose product is the weighted sum of the updates.

    Raises:
        UserError: sizes differ, or the number of weights does.
    """
    factors = weight_list(layers, weights)
    check_sizes(layers)
    scaled = [factor * layer.scaling * layer.A.double() for layer, factor in zip(layers, factors, strict=True)]
    return torch.cat(scaled), torch.cat([layer.B.double() for layer in layers], dim=1)


def nearest_of_rank(a: Tensor, b: Tensor, rank: int, dtype: torch.dtype) -> LoraLayer:
    """The best approximation of ``b @ a`` of at most the given rank, its singular values shared equally by A and B.

    The SVD is that of the R x R product of the triangular factors of ``b`` and ``a^T``: exact, at the cost of two thin
    QR decompositions.

    Args:
        a: [R, n].
        b: [o, R].
        rank: of the result, or R if that is less.
        dtype: of the result's factors.
    """
    output_basis, output_triangle = torch.linalg.qr(b)
    input_basis, input_triangle = torch.linalg.qr(a.mT)
    left, values, right = torch.linalg.svd(output_triangle @ input_triangle.mT, full_matrices=False)
    roots = values[:rank].sqrt()
    down = (roots.unsqueeze(-1) * right[:rank]) @ input_basis.mT
    up = output_basis @ (left[:, :rank] * roots)
    return LoraLayer(down.to(dtype), up.to(dtype))
