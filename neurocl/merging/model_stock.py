"""Model stock: between the base and the average of the models, at a point that the angles of the models tell.

``N`` models, ``*shape`` the shape of one parameter, n entries of one piece.
"""

from __future__ import annotations

import math

from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.average import average
from neurocl.merging.method import measured_on, merge_method
from neurocl.merging.sums import StreamProducts

# Below this, 1 + (N - 1) cos is round-off: the task vectors cancel and their average is zero whatever the ratio.
CANCELLED = 1e-12


class ModelStockMeasurement:
    """The mean cosine between the task vectors of a tensor, over all pairs.

    Attributes:
        cosine: the mean; a pair with an all-zero task vector counts as orthogonal.
    """

    def __init__(self, num_models: int) -> None:
        if num_models < 2:
            raise UserError(f"model-stock needs at least 2 models, got {num_models}")
        self._products = StreamProducts(num_models)
        self.cosine = 0.0

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``base`` [n], ``models`` [N, n]."""
        self._products.add(models - base)

    def another_pass(self) -> bool:
        """False: one pass gives all scalar products."""
        products = self._products.totals()
        cosines = []
        for first, second in products:
            if first == second:
                continue
            lengths = math.sqrt(products[first, first]) * math.sqrt(products[second, second])
            cosines.append(products[first, second] / lengths if lengths > 0 else 0.0)
        self.cosine = math.fsum(cosines) / len(cosines)
        return False


@merge_method("model-stock", min_models=2, measure=ModelStockMeasurement, returns_single=False)
def model_stock(base: Tensor, models: Tensor, *, measured: ModelStockMeasurement | None = None) -> Tensor:
    """Go from the base towards the average as far as the models agree.

    Args:
        base: pre-trained tensor, [*shape].
        models: fine-tuned tensors, [N, *shape].
        measured: the mean cosine of the whole task vectors; taken over ``models`` if not given.

    Returns: merged tensor, [*shape]: the average where all task vectors are parallel, the base where they are
        orthogonal.

    Raises:
        UserError: there are fewer than two models.

    Reference: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv 2403.19522.
    """
    if measured is None:
        measured = measured_on(ModelStockMeasurement(len(models)), base, models)
    ratio = stock_ratio(measured.cosine, len(models))
    return average(base, models) * ratio + base * (1 - ratio)


def stock_ratio(cosine: float, num_models: int) -> float:
    """Share of the average, N cos / (1 + (N - 1) cos); 0 where the task vectors cancel."""
    denominator = 1 + (num_models - 1) * cosine
    return num_models * cosine / denominator if denominator > CANCELLED else 0.0
