"""Fisher merging: every parameter is the mean of the models', weighted by how sure each model is of it.

``N`` models, F_i the diagonal Fisher information of model i on its own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.method import merge_method
from neurocl.merging.statistics import Statistics


@merge_method("fisher", scope="elements", statistic="fisher", needs_base=False)
def fisher_merging(
    base: Tensor,
    models: Tensor,
    *,
    fisher: Tensor,
    weights: Tensor | None = None,
    floor: Annotated[float, Field(ge=0)] = 1e-6,
) -> Tensor:
    """Average each parameter with the diagonal Fisher information as weight.

    theta = sum c_i (F_i + floor) theta_i / sum c_i (F_i + floor), entry by entry.

    Args:
        base: unused, [*shape].
        models: the fine-tuned tensors, [N, *shape].
        fisher: diagonal Fisher of each model, [N, *shape].
        weights: weight c_i of each model, [N]; :func:`fisher_weights` gives those that make models comparable.
        floor: added to the Fisher, so that entries which nobody is sure of are averaged.
    Returns: [*shape].

    Reference: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022, arXiv 2111.09832.
    """
    first = models[0]
    total, moved, plain = torch.zeros_like(first), torch.zeros_like(first), torch.zeros_like(first)
    # One model after the other: the order in which a reduction adds may depend on the shape of the piece.
    for index, model in enumerate(models):
        share = fisher[index].to(models.dtype) + floor
        if weights is not None:
            share = share * weights[index].to(models)
        change = model - first
        total += share
        moved += share * change
        plain += change
    known = total > 0
    return first + torch.where(known, moved / torch.where(known, total, 1), plain / len(models))


def fisher_weights(statistics: Sequence[Statistics]) -> Tensor:
    """Weights c_i [N] proportional to 1/||F_i||, the norm over all Fisher entries of model i; they add up to 1.

    Without them a model with large gradients outvotes the others everywhere.

    Raises:
        UserError: a model without Fisher information, or with nothing but zeros.
    """
    norms = []
    for position, own in enumerate(statistics, 1):
        squares = sum(float(own.mean("fisher", name).double().square().sum()) for name in own.names("fisher"))
        if squares == 0:
            raise UserError(f"the statistics of model {position} hold no Fisher information")
        norms.append(squares**0.5)
    inverse = torch.tensor(norms, dtype=torch.float64).reciprocal()
    return inverse / inverse.sum()
