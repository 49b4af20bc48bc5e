"""Ramps against the fixture."""

from __future__ import annotations

import numpy as np
import pytest

from neurocl.trajectory.schedules import cosine_ramp
from tests.conftest import reference


def test_ramps_are_those_of_the_reference() -> None:
    case = reference("trajectory/anneal")
    weights = [cosine_ramp(step, 0, 3000) for step in case["alpha_embedding_step"]]
    np.testing.assert_allclose(weights, case["alpha_embedding"], rtol=1e-5, atol=1e-12)
    strengths = [cosine_ramp(step, 50_000, 100_000) for step in case["step"]]
    np.testing.assert_allclose(strengths, case["lora_alpha"], rtol=1e-5, atol=1e-12)


def test_a_ramp_of_no_length_jumps_and_a_backward_one_is_refused() -> None:
    assert cosine_ramp(0, 0, 0) == 1
    assert cosine_ramp(-1, 0, 0) == 0
    assert cosine_ramp(5, 0, 10, low=2, high=2) == 2
    with pytest.raises(ValueError, match="must not end before"):
        cosine_ramp(0, 2, 1)
