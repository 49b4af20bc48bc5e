"""Task arithmetic with task vectors thinned by magnitude: model breadcrumbs and plain pruning.

``N`` models, ``*shape`` the shape of one parameter, n entries of one piece or tensor.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.magnitudes import Magnitudes
from neurocl.merging.method import measured_on, merge_method
from neurocl.merging.sums import StreamSum
from neurocl.merging.ties import trim_rank

Norm = Literal["none", "l1", "l2", "linf"]


class BreadcrumbsMeasurement:
    """The smallest and the largest magnitude that stay in each task vector of a tensor.

    Attributes:
        values: [N, 2] float64.
    """

    def __init__(self, num_models: int, density: float = 0.9, gamma: float = 0.01) -> None:
        self._magnitudes = Magnitudes(num_models, lambda num_entries: breadcrumb_ranks(num_entries, density, gamma))
        self.values = torch.empty(0)

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``base`` [n], ``models`` [N, n]."""
        self._magnitudes.update(base, models)

    def another_pass(self) -> bool:
        """True once: the first pass counts, the second selects."""
        if self._magnitudes.another_pass():
            return True
        self.values = self._magnitudes.values
        return False


@merge_method("breadcrumbs", measure=BreadcrumbsMeasurement, returns_single=False)
def breadcrumbs(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    measured: BreadcrumbsMeasurement | None = None,
    density: Annotated[float, Field(gt=0, le=1)] = 0.9,
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.01,
) -> Tensor:
    """Add task vectors without their largest and their smallest entries.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the task vectors, [N], 1 if not given.
        measured: smallest and largest magnitude to keep; taken over ``models`` if not given.
        density: share of every tensor that stays.
        gamma: share of every tensor that is dropped first, the largest magnitudes.

    Returns: merged tensor, [*shape].

    Entries as large as the smallest or the largest that is kept stay too.

    Reference: Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    ECCV 2024, arXiv 2312.06795.
    """
    if measured is None:
        measured = measured_on(BreadcrumbsMeasurement(len(models), density, gamma), base, models)
    total = torch.zeros_like(base)
    for index, (model, bounds) in enumerate(zip(models, measured.values.to(base), strict=True)):
        task_vector = model - base
        magnitude = task_vector.abs()
        kept = torch.where((magnitude >= bounds[0]) & (magnitude <= bounds[1]), task_vector, 0.0)
        total += kept if weights is None else kept * weights[index]
    return base + total


def breadcrumb_ranks(num_entries: int, density: float, gamma: float) -> tuple[int, int]:
    """Ranks, counted from 1 in ascending order, of the smallest and the largest magnitude that stay."""
    num_kept, num_top = int(density * num_entries), int(gamma * num_entries)
    num_bottom = max(0, num_entries - num_kept - num_top)
    if num_kept == 0:
        return num_entries + 1, num_entries + 1
    return num_bottom + 1, num_bottom + num_kept


class PruneMeasurement:
    """The smallest magnitude that stays in each task vector of a tensor, and the factor that restores its norm.

    Attributes:
        thresholds: [N] float64.
        scales: [N], 1 without ``rescale``.
    """

    thresholds: Tensor

    def __init__(self, num_models: int, density: float = 0.2, rescale: Norm = "none") -> None:
        self._magnitudes: Magnitudes | None = Magnitudes(
            num_models, lambda num_entries: [trim_rank(num_entries, density, "exact")]
        )
        self._rescale = rescale
        self._before = [StreamSum() for _ in range(num_models)]
        self._after = [StreamSum() for _ in range(num_models)]
        self.scales = [1.0] * num_models

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``base`` [n], ``models`` [N, n]."""
        if self._magnitudes is not None:
            self._magnitudes.update(base, models)
            return
        for index, model in enumerate(models):
            magnitude = (model - base).abs().double()
            measure = magnitude * magnitude if self._rescale == "l2" else magnitude
            self._before[index].add(measure)
            self._after[index].add(torch.where(magnitude >= self.thresholds[index], measure, 0.0))

    def another_pass(self) -> bool:
        """True until the thresholds are known and, to restore a norm, the norms too."""
        if self._magnitudes is not None:
            if self._magnitudes.another_pass():
                return True
            self.thresholds = self._magnitudes.values[:, 0]
            self._magnitudes = None
            # The largest entry stays if any does, so the maximum norm is what it was.
            return self._rescale in ("l1", "l2")
        totals = [(before.total(), after.total()) for before, after in zip(self._before, self._after, strict=True)]
        ratios = [before / after if after > 0 else 1.0 for before, after in totals]
        self.scales = [math.sqrt(ratio) for ratio in ratios] if self._rescale == "l2" else ratios
        return False


@merge_method("magnitude-prune", measure=PruneMeasurement, returns_single=False)
def magnitude_prune(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    measured: PruneMeasurement | None = None,
    density: Annotated[float, Field(gt=0, le=1)] = 0.2,
    rescale: Norm = "none",
) -> Tensor:
    """Add task vectors pruned to the largest entries of every tensor.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the task vectors, [N], 1 if not given.
        measured: smallest magnitude to keep and scale; taken over ``models`` if not given.
        density: share of every tensor that stays; entries as large as the smallest that is kept stay too.
        rescale: norm that every pruned task vector is scaled back to; linf is kept by pruning as it is.

    Returns: merged tensor, [*shape].

    Reference: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
    arXiv 1506.02626.
    """
    if measured is None:
        measured = measured_on(PruneMeasurement(len(models), density, rescale), base, models)
    total = torch.zeros_like(base)
    for index, (model, threshold) in enumerate(zip(models, measured.thresholds.to(base), strict=True)):
        task_vector = model - base
        kept = torch.where(task_vector.abs() >= threshold, task_vector, 0.0) * measured.scales[index]
        total += kept if weights is None else kept * weights[index]
    return base + total
