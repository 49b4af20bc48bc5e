"""The weighted average of the models: uniform when no weights are given, a model soup.

``N`` models, ``*shape`` the shape of one parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.method import merge_method


@merge_method("average", needs_base=False, spreads_nan=True)
def average(base: Tensor, models: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Average the models, weighted if weights are given.

    Args:
        base: unused pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the models, [N]; only their ratios matter.

    Returns: merged tensor, [*shape].

    Raises:
        UserError: the weights add up to zero.

    Reference: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", ICML 2022, arXiv 2203.05482.
    """
    # One model after the other: the order in which a reduction adds may depend on the shape of the piece.
    if weights is None:
        total = models[0].clone()
        for model in models[1:]:
            total += model
        return total.div_(len(models))
    shares = shares_of(weights).to(models)
    total = models[0] * shares[0]
    for model, share in zip(models[1:], shares[1:], strict=True):
        total += model * share
    return total


def shares_of(weights: Tensor) -> Tensor:
    """Weights divided by their sum, [N].

    Raises:
        UserError: the sum is zero.
    """
    total = weights.sum()
    if total == 0 or not torch.isfinite(total):
        raise UserError(f"the weights of an average must have a sum that is not zero, got {weights.tolist()}")
    return weights / total
