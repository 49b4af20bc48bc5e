"""RegMean: the matrix whose responses come closest, in the least-squares sense, to those of all fine-tuned matrices.

``N`` models, ``o`` outputs and ``d`` inputs of a linear layer, G = X^T X [d, d] the Gram matrix of its inputs.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from neurocl.merging.linear_algebra import solve_psd
from neurocl.merging.method import Copies, merge_method


@merge_method("regmean", scope="matrix", statistic="gram", needs_base=False, copies=Copies(square=10.0))
def regmean(
    base: Tensor,
    models: Tensor,
    *,
    gram: Tensor,
    weights: Tensor | None = None,
    off_diagonal: Annotated[float, Field(ge=0, le=1)] = 0.9,
    ridge: Annotated[float, Field(ge=0)] = 0.0,
) -> Tensor:
    """Match the responses of every linear layer by least squares.

    W = (sum c_i W_i G_i)(sum c_i G_i)^+, solved for the deviation from the mean of the models, so that inputs which
    no data reach get the mean.

    Args:
        base: unused, [o, d].
        models: the fine-tuned matrices, [N, o, d].
        gram: Gram matrix of the inputs of each model, [N, d, d], or only its diagonal, [N, d].
        weights: weight c_i of each model, [N]; one each if None.
        off_diagonal: factor on the Gram matrices' entries off the diagonal; 0 averages every column by itself.
        ridge: pull towards the mean, relative to the mean of the Gram diagonal; 0 uses the pseudo-inverse.
    Returns: [o, d].
    Raises: ValueError if the shapes do not fit.

    Reference: Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless knowledge fusion by merging weights of language models",
    ICLR 2023, arXiv 2212.09849.
    """
    return merge_responses(models, shrunk(gram, off_diagonal), weights=weights, ridge=ridge)


def merge_responses(
    models: Tensor,
    grams: Tensor,
    *,
    crosses: Tensor | None = None,
    weights: Tensor | None = None,
    ridge: float = 0.0,
) -> Tensor:
    """Least-squares merge of matrices, as a deviation from their mean.

    min over W of sum c_i ||Xh_i W^T - X_i W_i^T||^2. With M = sum c_i W_i / sum c_i and S = sum c_i G_i the solution is
    M + [sum c_i ((W_i - M) K_i + M (K_i - G_i))] (S + ridge mean(diag S) I)^+.

    Args:
        models: W_i, [N, o, d].
        grams: G_i = Xh_i^T Xh_i, [N, d, d], or only their diagonals, [N, d].
        crosses: K_i = X_i^T Xh_i, shaped like ``grams``; None where X_i = Xh_i.
        weights: c_i, [N]; one each if None.
        ridge: relative to the mean of the diagonal of S.
    Returns: [o, d]. Identical models are returned exactly.
    Raises: ValueError if the shapes do not fit.
    """
    count, d = models.shape[0], models.shape[-1]
    if grams.shape not in ((count, d), (count, d, d)) or (crosses is not None and crosses.shape != grams.shape):
        raise ValueError(f"Gram matrices [{count}, {d}, {d}] or diagonals [{count}, {d}] expected, got {grams.shape}")
    grams = grams.to(models.dtype)
    mean = weighted_mean(models, weights)
    c = torch.ones(count, dtype=models.dtype, device=models.device) if weights is None else weights.to(models)
    if grams.ndim == 2:
        total = c @ grams
        right = torch.einsum("n,nod,nd->od", c, models - mean, grams if crosses is None else crosses.to(models.dtype))
        if crosses is not None:
            right = right + mean * (c @ (crosses.to(models.dtype) - grams))
        system = total + ridge * total.mean()
        return mean + divided(right, system)
    system = torch.einsum("n,nde->de", c, grams)
    right = torch.zeros_like(mean)
    for index in range(count):
        gram = grams[index]
        cross = gram if crosses is None else crosses[index].to(models.dtype)
        right += c[index] * ((models[index] - mean) @ cross)
        if crosses is not None:
            right += c[index] * (mean @ (cross - gram))
    return mean + solve_psd(system, right.T, ridge=ridge).T


def divided(right: Tensor, system: Tensor) -> Tensor:
    """``right`` [o, d] over ``system`` [d], column by column; zero where the system is."""
    reached = system > 0
    quotient: Tensor = torch.where(reached, right / torch.where(reached, system, 1), 0)
    return quotient


def weighted_mean(models: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of ``models`` [N, *shape], exact where they are all equal; the plain mean if the weights add up to 0."""
    first = models[0]
    if weights is None or float(weights.sum()) == 0:
        return first + (models - first).mean(0)
    c = weights.to(models)
    return first + torch.einsum("n,n...->...", c / c.sum(), models - first)


def shrunk(grams: Tensor, off_diagonal: float) -> Tensor:
    """Gram matrices [..., d, d] with everything off the diagonal times ``off_diagonal``; [..., d] if that is 0.

    Diagonals [N, d] are returned as they are.
    """
    if grams.ndim == 2 or off_diagonal == 1:
        return grams
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    if off_diagonal == 0:
        return diagonal
    result = grams * off_diagonal
    result.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return result
