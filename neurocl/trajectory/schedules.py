"""Ramps of training: how a weight rises from one value to another between two steps."""

from __future__ import annotations

import math


def cosine_ramp(step: float, start: float, end: float, low: float = 0.0, high: float = 1.0) -> float:
    """``low`` up to ``start``, ``high`` from ``end`` on, and 1 - cos between, which starts slowly.

    Args:
        step: where training is; steps and fractions of the whole both do.
        start: last step at ``low``.
        end: first step at ``high``; not before ``start``.
        low: value before the ramp.
        high: value after it.

    Raises:
        ValueError: ``end`` before ``start``.

    Reference: Benaglia et al., "Trajectory forecasting through low-rank adaptation of discrete latent codes",
    ICPR 2024, arXiv 2405.20743.
    """
    if end < start:
        raise ValueError(f"a ramp must not end before it starts, got {start} and {end}")
    if step >= end:
        return high
    if step <= start:
        return low
    share = (step - start) / (end - start)
    risen = 1 - math.cos(share * math.pi / 2)
    return risen * high + (1 - risen) * low
