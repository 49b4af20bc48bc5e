"""Isotropic merging: Iso-C and Iso-CTS, which flatten the spectrum of the merged matrix, and subspace alignment.

``N`` models, ``m`` and ``n`` rows and columns, ``r = min(m, n)``. Task matrices are tau_t = models_t - base, scaled by
the weights; the spectrum is that of their sum, as in the paper, not of their mean.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.linear_algebra import SvdSolver, polar, truncated_svd
from neurocl.merging.method import Copies, merge_method

RankTolerance = Annotated[float, Field(ge=0, lt=1)]


def task_matrices(base: Tensor, models: Tensor, weights: Tensor | None) -> Tensor:
    """``weights_t (models_t - base)``, [N, m, n]."""
    tasks = models - base
    if weights is None:
        return tasks
    return tasks * weights.to(tasks).reshape(-1, *[1] * base.ndim)


@merge_method("iso-c", scope="matrix", returns_single=False, copies=Copies(1.5, 10.0))
def iso_c(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    flatten: Annotated[float, Field(ge=0, le=1)] = 1.0,
    rank_tolerance: RankTolerance = 0.0,
) -> Tensor:
    """Sum of task matrices with all singular values set to their mean.

    Where the sum has not full rank, its null space is filled with arbitrary directions that get the same weight as
    the others (so does the method as published); ``rank_tolerance`` leaves them out.

    Args:
        base: pre-trained matrix [..., m, n].
        models: fine-tuned matrices [N, ..., m, n].
        weights: one factor per task matrix [N]; all one if None.
        flatten: share of the way from the sum (0, task arithmetic) to the flat spectrum (1, Iso-C).
        rank_tolerance: leave out directions below this share of the largest singular value; the mean is taken over
            the others.
    Returns: merged matrix [..., m, n].

    Reference: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    ICML 2025, arXiv 2502.04959.
    """
    total = task_matrices(base, models, weights).sum(dim=0)
    if flatten == 0 or not total.any():
        return base + total
    factor, values = polar(total, rank_tolerance=rank_tolerance)
    kept = values >= rank_tolerance * values[..., :1]
    mean = (values * kept).sum(dim=-1) / kept.sum(dim=-1)
    return base + (1 - flatten) * total + flatten * mean[..., None, None] * factor


@merge_method("iso-cts", scope="matrix", returns_single=False, copies=Copies(5.3, 11.0))
def iso_cts(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    common_fraction: Annotated[float, Field(ge=0, le=1)] = 0.8,
    task_rank: Literal["round", "floor"] = "round",
    rank_tolerance: RankTolerance = 0.0,
    svd: SvdSolver = "exact",
) -> Tensor:
    """Iso-C with the weakest common directions replaced by those of each task.

    The common part is spanned by the leading singular vectors of the summed task matrices, the rest by the leading
    ones of what each task matrix leaves after projection on it from the left. With more tasks than directions to
    share there is no task-specific part and the result is that of Iso-C.

    Args:
        base: pre-trained matrix [m, n].
        models: fine-tuned matrices [N, m, n].
        weights: one factor per task matrix [N]; all one if None.
        common_fraction: share of the r directions that is common to all tasks; 1 is Iso-C.
        task_rank: how the remaining directions are divided by the number of tasks; what does not divide is common.
        rank_tolerance: leave out directions below this share of the largest singular value; 0 keeps arbitrary
            directions of matrices without full rank, as published.
        svd: solver for the leading directions of the tasks.
    Returns: merged matrix [m, n].

    Reference: Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    ICML 2025, arXiv 2502.04959.
    """
    tasks = task_matrices(base, models, weights)
    if not tasks.any():
        return base.clone()
    common_rank, rank_of_task = split_ranks(min(base.shape), len(tasks), common_fraction, task_rank)
    left, values, right = truncated_svd(tasks.sum(dim=0), common_rank)
    if rank_of_task:
        residuals = tasks - left @ (left.mT @ tasks)
        task_left, task_values, task_right = truncated_svd(residuals, rank_of_task, svd=svd)
        left = torch.cat([task_left.movedim(0, 1).flatten(1), left], dim=1)
        values = torch.cat([task_values.flatten(), values])
        right = torch.cat([task_right.flatten(0, 1), right])
    if rank_tolerance:
        kept = values >= rank_tolerance * values.max()
        left, values, right = left[:, kept], values[kept], right[kept]
    left, _ = polar(left, rank_tolerance=rank_tolerance)
    right, _ = polar(right, rank_tolerance=rank_tolerance)
    return base + values.mean() * (left @ right)


def split_ranks(
    rank: int, num_tasks: int, common_fraction: float, task_rank: Literal["round", "floor"] = "round"
) -> tuple[int, int]:
    """Directions of the common part and of each task, ``common + num_tasks * task == rank``.

    Rounding is to the nearest, halves to even, and never gives the tasks more directions than there are.
    """
    share = (rank - math.floor(rank * common_fraction)) / num_tasks
    of_task = min(round(share) if task_rank == "round" else math.floor(share), rank // num_tasks)
    return rank - num_tasks * of_task, of_task


def subspace_alignment(task_matrix: Tensor, merged_matrix: Tensor, threshold: float = 0.95) -> float:
    """Share of a task matrix that lies in the dominant left subspace of a merged matrix (SAR).

    The subspace is spanned by the fewest left singular vectors whose singular values hold more than
    ``threshold`` of the Frobenius norm of the merged matrix.

    Args:
        task_matrix: fine-tuned less pre-trained matrix [m, n].
        merged_matrix: merged less pre-trained matrix [m, n].
        threshold: in [0, 1).
    Returns: the ratio of Frobenius norms, between 0 and 1; 0 if the merged matrix is zero, NaN if the task matrix is,
        which has no direction to align.

    Reference: Marczak et al., "No Task Left Behind", ICML 2025, arXiv 2502.04959.
    """
    if not task_matrix.any():
        return math.nan
    if not merged_matrix.any():
        return 0.0
    left, values, _ = torch.linalg.svd(merged_matrix, full_matrices=False)
    held = (values.square().cumsum(dim=0) / values.square().sum()).sqrt()
    rank = int((held <= threshold).sum()) + 1
    aligned: Tensor = left[:, :rank].mT @ task_matrix
    return float(torch.linalg.matrix_norm(aligned) / torch.linalg.matrix_norm(task_matrix))
