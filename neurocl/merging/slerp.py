"""Spherical interpolation between two models.

``*shape`` the shape of one parameter.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from neurocl.merging.method import measured_on, merge_method
from neurocl.merging.sums import StreamProducts

# Beyond this cosine the arc is so short, or so close to half a turn, that dividing by its sine loses digits.
STRAIGHT = 0.9995


class SlerpMeasurement:
    """The angle between two tensors.

    Attributes:
        cosine: of the angle, in [-1, 1]; 1 if a tensor is all zero.
    """

    def __init__(self, num_models: int = 2) -> None:
        if num_models != 2:
            raise ValueError(f"slerp interpolates between two models, got {num_models}")
        self._products = StreamProducts(2)
        self.cosine = 1.0

    def update(self, base: Tensor, models: Tensor) -> None:
        """Take in one piece: ``models`` [2, n]."""
        self._products.add(models)

    def another_pass(self) -> bool:
        """False: one pass gives the angle."""
        products = self._products.totals()
        lengths = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
        if lengths > 0:
            self.cosine = min(1.0, max(-1.0, products[0, 1] / lengths))
        return False


@merge_method("slerp", needs_base=False, num_models=2, min_models=2, measure=SlerpMeasurement, order_matters=True)
def slerp(
    base: Tensor,
    models: Tensor,
    *,
    measured: SlerpMeasurement | None = None,
    t: Annotated[float, Field(ge=0, le=1)] = 0.5,
) -> Tensor:
    """Interpolate two models along the arc between them, tensor by tensor.

    Args:
        base: unused pre-trained tensor, [*shape].
        models: the two models, [2, *shape].
        measured: the angle between the whole tensors; taken over ``models`` if not given.
        t: position on the arc; 0 gives the first model, 1 the second.

    Returns: merged tensor, [*shape].

    Tensors that point the same way, or opposite ways, within 1.8 degrees are interpolated along the straight line.

    Raises:
        ValueError: there are not exactly two models.

    Reference: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """
    if len(models) != 2:
        raise ValueError(f"slerp interpolates between two models, got {len(models)}")
    if measured is None:
        measured = measured_on(SlerpMeasurement(), base, models)
    first, second = arc_shares(measured.cosine, t)
    return models[0] * first + models[1] * second


def arc_shares(cosine: float, t: float) -> tuple[float, float]:
    """Factors of the two ends for the point ``t`` of the arc between them."""
    if abs(cosine) > STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
