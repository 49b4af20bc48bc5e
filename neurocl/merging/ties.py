"""TIES: trim every task vector, elect a sign for each entry, merge the task vectors that agree with it.

``N`` models, ``*shape`` the shape of one parameter, n entries of one piece.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.magnitudes import Magnitudes, compiled
from neurocl.merging.method import measured_on, merge_method

Trim = Literal["model", "tensor"]
Count = Literal["published", "exact"]
Sign = Literal["total", "frequency"]
Combine = Literal["mean", "sum", "max"]
Density = Annotated[float, Field(gt=0, le=1)]


class TiesMeasurement:
    """What TIES needs to know about whole task vectors: a threshold for each and the sign that prevails.

    Args:
        num_models: N.
        density: share of each task vector that stays, the largest magnitudes.
        count: how many entries that is, see :func:`ties`.
        sign: how the sign of an entry is elected, see :func:`ties`.
        weights: of the models, [N], or None for 1.

    Attributes:
        thresholds: smallest magnitude that stays, [N] float64; infinite if nothing does.
        majority: 1, -1 or 0: the sign that more entries elect, for those whose vote is a draw.
    """

    thresholds: Tensor
    majority: int

    def __init__(
        self,
        num_models: int,
        density: float = 0.2,
        count: Count = "published",
        sign: Sign = "total",
        weights: Tensor | None = None,
    ) -> None:
        self._magnitudes: Magnitudes | None = Magnitudes(
            num_models, lambda num_entries: [trim_rank(num_entries, density, count)]
        )
        self._num_models = num_models
        self._sign: Sign = sign
        self._weights = weights
        self._balance = 0

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``base`` [n], ``models`` [N, n]."""
        if self._magnitudes is not None:
            self._magnitudes.update(base, models)
        else:
            self._balance += _vote(base, models, _row(self._weights, models), self.thresholds, self._sign)

    def another_pass(self) -> bool:
        """True until the thresholds are known and, with several models, all entries have voted."""
        if self._magnitudes is not None:
            if self._magnitudes.another_pass():
                return True
            self.thresholds = self._magnitudes.values[:, 0]
            self._magnitudes = None
            # A single vote that is not zero cannot be a draw.
            if self._num_models > 1:
                return True
        self.majority = (self._balance > 0) - (self._balance < 0)
        return False


@merge_method("ties", measure=TiesMeasurement, measure_scope="model", returns_single=False)
def ties(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    measured: TiesMeasurement | None = None,
    density: Density = 0.2,
    trim: Trim = "model",
    count: Count = "published",
    sign: Sign = "total",
    combine: Combine = "mean",
) -> Tensor:
    """Keep the largest changes, elect a sign per entry, merge what agrees.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the models, [N]; they scale the trimmed task vectors before the vote.
        measured: thresholds and prevailing sign; taken over ``models`` if not given.
        density: share of each task vector that stays.
        trim: whether that share is of the whole model, as published, or of every tensor.
        count: published keeps floor(density * n) + 1 of n entries, as the authors' code does; exact keeps
            floor(density * n). Entries as large as the smallest that is kept stay too.
        sign: elected by the sum of the trimmed task vectors (total) or of their signs (frequency).
        combine: mean or sum of the agreeing entries (weighted), or the one of largest magnitude (max).

    Returns: merged tensor, [*shape].

    Where the vote is a draw, the sign that prevails over all entries decides.

    Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, arXiv 2306.01708.
    """
    if measured is None:
        measured = measured_on(TiesMeasurement(len(models), density, count, sign, weights), base, models)
    return elect_and_combine(base, models, measured, weights=weights, sign=sign, combine=combine)


def trim_rank(num_entries: int, density: float, count: Count = "published") -> int:
    """Rank, counted from 1 in ascending order, of the smallest magnitude that stays; below 1 if all stay."""
    return num_entries - int(num_entries * density) + (1 if count == "exact" else 0)


def elect_and_combine(
    base: Tensor,
    models: Tensor,
    measured: TiesMeasurement,
    *,
    weights: Tensor | None = None,
    sign: Sign = "total",
    combine: Combine = "mean",
) -> Tensor:
    """The second and third step of TIES, given the thresholds of the first.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        measured: thresholds and prevailing sign.
        weights, sign, combine: as for :func:`ties`.

    Returns: merged tensor, [*shape].
    """
    row = _row(weights, models)
    kernels = compiled(base, models)
    if kernels is not None:
        merged: Tensor = kernels.combine(
            base.contiguous().view(-1),
            models.contiguous().view(len(models), -1),
            row,
            measured.thresholds.to(models.dtype),
            measured.majority,
            sign == "frequency",
            combine,
        )
        return merged.view(base.shape)
    elected = _total(base, models, row, measured.thresholds, sign).sign_()
    elected[elected == 0] = measured.majority
    value, share = torch.zeros_like(base), torch.zeros_like(base)
    for index, weight in enumerate(row):
        kept = _kept(base, models[index], weight, measured.thresholds[index])
        agreeing = torch.where(kept * elected > 0, kept, 0.0)
        if combine == "max":
            value = torch.where(agreeing.abs() > value.abs(), agreeing, value)
        else:
            value += agreeing
            share += torch.where(agreeing != 0, weight.abs(), 0.0)
    if combine == "mean":
        value /= torch.where(share != 0, share, 1.0)
    return base + value


# Only multiplications, additions and comparisons, one after the other: what a fused multiply-add or a reduction over
# the models gives could depend on how the tensor was cut.
def _kept(base: Tensor, model: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    difference = model - base
    return torch.where(difference.abs() >= threshold.to(base), difference * weight, 0.0)


def _total(base: Tensor, models: Tensor, row: Tensor, thresholds: Tensor, sign: Sign) -> Tensor:
    total = torch.zeros_like(base)
    for model, weight, threshold in zip(models, row, thresholds, strict=True):
        kept = _kept(base, model, weight, threshold)
        total += kept.sign() if sign == "frequency" else kept
    return total


def _vote(base: Tensor, models: Tensor, row: Tensor, thresholds: Tensor, sign: Sign) -> int:
    """Entries that elect plus, less those that elect minus."""
    kernels = compiled(base, models)
    if kernels is not None:
        votes = kernels.vote(
            base.contiguous(), models.contiguous(), row, thresholds.to(models.dtype), sign == "frequency"
        )
        return int(votes)
    total = _total(base, models, row, thresholds, sign)
    return int((total > 0).sum()) - int((total < 0).sum())


def _row(weights: Tensor | None, models: Tensor) -> Tensor:
    """Weights in the type of the models, [N]."""
    if weights is None:
        return torch.ones(len(models), dtype=models.dtype, device=models.device)
    return weights.to(models)
