"""Task arithmetic: the base plus the weighted sum of the task vectors.

``N`` models, ``*shape`` the shape of one parameter. A task vector is a fine-tuned tensor less the base tensor.
"""

from __future__ import annotations

from torch import Tensor

from neurocl.merging.method import merge_method


@merge_method("task-arithmetic", spreads_nan=True)
def task_arithmetic(base: Tensor, models: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Add the weighted sum of the task vectors; a negative weight unlearns.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        weights: of the task vectors, [N], 1 if not given; they are not normalised.

    Returns: merged tensor, [*shape].

    Reference: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089.
    """
    total = models[0] - base
    if weights is not None:
        total *= weights[0]
    for index, model in enumerate(models[1:], start=1):
        task_vector = model - base
        if weights is not None:
            task_vector *= weights[index]
        total += task_vector
    return total.add_(base)
