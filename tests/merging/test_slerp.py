"""Spherical interpolation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from neurocl.merging.slerp import SlerpMeasurement, slerp
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models

NAMES = ("a.weight", "a.bias", "b.weight", "ln.weight")


def stored_models(stored: dict[str, Any], name: str) -> Tensor:
    """The two models of the reference, which were made in float32."""
    return torch.stack(
        [torch.from_numpy(stored[f"base/{name}"] + stored[f"tv{task}/{name}"]) for task in range(2)]
    ).double()


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_reference_values_are_reproduced(t: float) -> None:
    stored = reference("merging-baselines/slerp")
    for name in NAMES:
        models = stored_models(stored, name)
        expected = torch.from_numpy(stored[f"x/slerp_t{t}/{name}"])
        torch.testing.assert_close(slerp(models[0], models, t=t), expected, rtol=1e-10, atol=0)


def test_parallel_tensors_are_interpolated_along_the_line() -> None:
    stored = reference("merging-baselines/slerp")
    for name in NAMES:
        tensor = stored_models(stored, name)[0]
        longer = (1.5 * tensor.float()).double()
        merged = slerp(tensor, torch.stack([tensor, longer]), t=0.3)
        torch.testing.assert_close(merged, torch.from_numpy(stored[f"x/slerp_colinear/{name}"]), rtol=1e-10, atol=0)


def test_the_ends_are_the_models() -> None:
    base, models = random_models(2, 8, 9)
    models[1] = models[1].flip(0)
    assert torch.equal(slerp(base, models, t=0.0), models[0])
    assert torch.equal(slerp(base, models, t=1.0), models[1])


def test_the_norm_of_equally_long_tensors_is_kept() -> None:
    _, models = random_models(2, 500)
    models[1] = torch.randn(500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    models /= models.norm(dim=1, keepdim=True)
    assert slerp(models[0], models, t=0.3).norm().item() == pytest.approx(1, abs=1e-14)


def test_a_quarter_turn_is_divided_evenly() -> None:
    merged = slerp(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), t=1 / 3)
    torch.testing.assert_close(merged, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


@pytest.mark.parametrize("other", [0.0, -1.0])
def test_zero_and_opposite_tensors_are_interpolated_along_the_line(other: float) -> None:
    tensor = torch.arange(1.0, 5.0)
    merged = slerp(tensor, torch.stack([tensor, other * tensor]), t=0.25)
    torch.testing.assert_close(merged, (0.75 + 0.25 * other) * tensor)


def test_pieces_give_the_bits_of_the_whole() -> None:
    base, models = random_models(2, 10_007)
    models[1] = models[1].flip(0)
    whole = slerp(base, models, t=0.3)
    assert torch.equal(merged_in_pieces(slerp, base, models, [1, 5, 4096, 4097, 9000], t=0.3), whole)


def test_other_numbers_of_models_are_refused() -> None:
    base, models = random_models(3, 4)
    with pytest.raises(ValueError, match="two models, got 3"):
        slerp(base, models)
    with pytest.raises(ValueError, match="two models, got 1"):
        SlerpMeasurement(1)


def test_empty_tensors_pass() -> None:
    assert slerp(torch.empty(0), torch.empty(2, 0)).shape == (0,)
