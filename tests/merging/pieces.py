"""Merging cut-up tensors the way the engine does, to compare with merging them whole."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from neurocl.merging.method import MergeMethod, whereabouts


def merged_in_pieces(
    function: Any,
    base: Tensor,
    models: Tensor,
    cuts: Sequence[int],
    *,
    weights: Tensor | None = None,
    name: str = "",
    **options: Any,
) -> Tensor:
    """``function`` over ``base`` [n] and ``models`` [N, n] cut before the entries ``cuts``."""
    method: MergeMethod = function.merge
    resolved = method.resolve(options)
    borders = [0, *cuts, base.numel()]
    pieces = [(start, base[start:stop], models[:, start:stop]) for start, stop in pairwise(borders)]
    supplied: dict[str, Any] = {"name": name} if "name" in method.supplied else {}
    if weights is not None:
        supplied["weights"] = weights
    if method.measure is not None:
        wanted = inspect.signature(method.measure).parameters
        given = {key: value for key, value in {**resolved, "weights": weights}.items() if key in wanted}
        measurement = method.measure(num_models=len(models), **given)
        while True:
            for start, part, stacked in pieces:
                measurement.update(part, stacked, **whereabouts(measurement, name, start))
            if not measurement.another_pass():
                break
        supplied["measured"] = measurement
    merged = []
    for start, part, stacked in pieces:
        if "offset" in method.supplied:
            supplied["offset"] = start
        merged.append(function(part, stacked, **supplied, **resolved))
    return torch.cat(merged)


def random_models(num_models: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A base [*shape] and models [N, *shape] near it, float64, with some entries left as they were."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=generator, dtype=torch.float64)
    changes = torch.randn(num_models, *shape, generator=generator, dtype=torch.float64) * 0.05
    changes *= torch.rand(num_models, *shape, generator=generator) > 0.1
    return base, base + changes
