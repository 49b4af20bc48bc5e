"""WUDI: the matrix that answers like every expert on inputs guessed from the task vectors themselves.

``N`` models, ``m`` and ``n`` rows (outputs) and columns (inputs). Task matrices are tau_t = models_t - base.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.linear_algebra import solve_psd
from neurocl.merging.method import Copies, merge_method


@merge_method("wudi", scope="matrix", copies=Copies(3.0, 16.0, square=17.0))
def wudi(
    base: Tensor,
    models: Tensor,
    *,
    weights: Tensor | None = None,
    solver: Literal["adam", "closed"] = "adam",
    num_steps: Annotated[int, Field(ge=0)] = 300,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5,
    ridge: Annotated[float, Field(ge=0)] = 0.0,
) -> Tensor:
    """Least interference on inputs guessed from the task vectors, without data.

    Minimises ``sum_t ||(D - tau_t) tau_t^T||_F^2 / ||tau_t||_F^2`` over the merged task matrix D. The published
    method takes a fixed number of Adam steps from the sum of task matrices and stops far from the minimum;
    ``closed`` is the minimum, a RegMean whose Gram matrices are ``tau_t^T tau_t``.

    Args:
        base: pre-trained matrix [m, n].
        models: fine-tuned matrices [N, m, n].
        weights: one factor per term of the objective, and per task matrix in the sum Adam starts from, [N], not
            negative; all one if None.
        solver: the published iteration or the minimum itself.
        num_steps: Adam steps.
        learning_rate: of Adam.
        ridge: pull of the closed form towards the mean task matrix, relative to the mean eigenvalue of the system.
    Returns: merged matrix [m, n].

    Reference: Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
    Vectors", ICML 2025, arXiv 2503.08099.
    """
    tasks = models - base
    factors = torch.ones(len(tasks)).to(tasks) if weights is None else weights.to(tasks)
    squares = tasks.square().sum(dim=(-2, -1))
    if not tasks.any():
        return base.clone()
    importance = torch.where(squares > 0, factors / torch.where(squares > 0, squares, 1), 0)
    grams = importance[:, None, None] * (tasks.mT @ tasks)
    if solver == "closed":
        # Solving for the deviation from the mean leaves the mean where the objective says nothing.
        mean = (factors[:, None, None] * tasks).sum(dim=0) / factors.sum()
        pull = ((tasks - mean) @ grams).sum(dim=0)
        return base + mean + solve_psd(grams.sum(dim=0), pull.mT, ridge=ridge).mT
    merged = (factors[:, None, None] * tasks).sum(dim=0).detach()
    adam = torch.optim.Adam([merged], lr=learning_rate)
    system, target = grams.sum(dim=0).detach(), (tasks @ grams).sum(dim=0).detach()
    for _ in range(num_steps):
        merged.grad = 2 * (merged @ system - target)
        adam.step()
    return base + merged
