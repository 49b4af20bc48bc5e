"""TSV-Merge: the leading singular triplets of every task, made orthogonal between tasks, and how much they interfere.

``N`` models, ``m`` and ``n`` rows and columns, ``r = min(m, n)``, ``k`` singular triplets kept per task.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.iso import task_matrices
from neurocl.merging.linear_algebra import SvdSolver, polar, truncated_svd
from neurocl.merging.method import Copies, merge_method

# Directions that different tasks share to this precision count once when their singular vectors are made orthogonal.
SHARED_DIRECTION = 1e-10


@merge_method("tsv-m", scope="matrix", copies=Copies(4.7, 5.0))
def tsv_merge(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    rank_fraction: Annotated[float, Field(gt=0, le=1)] | None = None,
    svd: SvdSolver = "exact",
) -> Tensor:
    """Sum of truncated task matrices with singular vectors orthogonal between tasks.

    Args:
        base: pre-trained matrix [m, n].
        models: fine-tuned matrices [N, m, n].
        weights: one factor per task matrix [N]; all one if None.
        rank_fraction: share of the r singular triplets kept of every task; one N-th if None. At least one is kept.
        svd: solver for the leading triplets.
    Returns: merged matrix [m, n].

    Reference: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
    arXiv 2412.00081.
    """
    left, values, right = task_singular_vectors(task_matrices(base, models, weights), rank_fraction, svd)
    if not len(values):
        return base.clone()
    left, _ = polar(left, rank_tolerance=SHARED_DIRECTION)
    right, _ = polar(right, rank_tolerance=SHARED_DIRECTION)
    return base + (left * values) @ right


def task_singular_vectors(
    tasks: Tensor, rank_fraction: float | None = None, svd: SvdSolver = "exact"
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of all task matrices, side by side in the order of the tasks.

    Triplets beyond the numerical rank of a task are left out: their vectors are arbitrary and would turn those of the
    other tasks.

    Args:
        tasks: [N, m, n].
        rank_fraction: share of the r triplets kept per task; one N-th if None.
        svd: solver.
    Returns: U [m, K], singular values [K], V^T [K, n], with K at most N k.
    """
    num_tasks, rows, columns = tasks.shape
    rank = min(rows, columns)
    kept_rank = rank // num_tasks if rank_fraction is None else math.floor(rank * rank_fraction)
    left, values, right = truncated_svd(tasks, min(rank, max(1, kept_rank)), svd=svd)
    noise = max(rows, columns) * torch.finfo(tasks.dtype).eps * values[:, :1]
    kept = (values > noise).flatten()
    return left.movedim(0, 1).flatten(1)[:, kept], values.flatten()[kept], right.flatten(0, 1)[kept]


def singular_task_interference(tasks: Tensor, rank_fraction: float | None = None) -> float:
    """How far the singular vectors of different tasks are from orthogonal: 0 for tasks that do not interfere.

    The sum of absolute entries of ``(U^T U - I) diag(s) (V^T V - I)``.

    Args:
        tasks: task matrices [N, m, n].
        rank_fraction: share of the r triplets taken of every task; one N-th if None.

    Reference: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", CVPR 2025,
    arXiv 2412.00081.
    """
    left, values, right = task_singular_vectors(tasks, rank_fraction)
    identity = torch.eye(len(values), dtype=tasks.dtype, device=tasks.device)
    interference: Tensor = ((left.mT @ left - identity) * values) @ (right @ right.mT - identity)
    return float(interference.abs().sum())
