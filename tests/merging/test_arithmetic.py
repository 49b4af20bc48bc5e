"""Task arithmetic."""

from __future__ import annotations

import pytest
import torch

from neurocl.merging.arithmetic import task_arithmetic
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models


def test_published_sums_are_reproduced() -> None:
    stored = reference("merging-tak-kfac/tak_merging")
    names = [key.removeprefix("out_ta_alpha3/") for key in stored if key.startswith("out_ta_alpha3/")]
    assert len(names) >= 6
    for name in names:
        vectors = torch.stack([torch.from_numpy(stored[f"in/tv{task}/{name}"]).double() for task in range(3)])
        merged = task_arithmetic(torch.zeros_like(vectors[0]), vectors)
        torch.testing.assert_close(merged, torch.from_numpy(stored[f"out_ta_alpha3/{name}"]), rtol=0, atol=1e-9)


def test_one_bfloat16_expert_is_returned_bit_for_bit() -> None:
    base, models = random_models(1, 1000)
    base, models = base.bfloat16().double(), models.bfloat16().double()
    assert torch.equal(task_arithmetic(base, models), models[0])


def test_a_negative_weight_takes_the_task_vector_away() -> None:
    base, models = random_models(1, 30)
    merged = task_arithmetic(base, models, weights=torch.tensor([-1.0]))
    torch.testing.assert_close(merged, base - (models[0] - base), rtol=1e-15, atol=1e-15)


def test_weights_scale_their_task_vectors() -> None:
    base, models = random_models(3, 30)
    merged = task_arithmetic(base, models, weights=torch.tensor([0.5, -2.0, 0.0]))
    expected = base + 0.5 * (models[0] - base) - 2 * (models[1] - base)
    torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-15)


def test_models_equal_to_the_base_change_nothing() -> None:
    base, _ = random_models(1, 30)
    assert torch.equal(task_arithmetic(base, base.expand(3, -1)), base)


def test_the_inputs_are_left_alone() -> None:
    base, models = random_models(3, 30)
    before = base.clone(), models.clone()
    task_arithmetic(base, models, weights=torch.ones(3))
    assert torch.equal(base, before[0])
    assert torch.equal(models, before[1])


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 0.3, 0.9])])
def test_pieces_give_the_bits_of_the_whole(weights: torch.Tensor | None) -> None:
    base, models = random_models(3, 1003)
    whole = task_arithmetic(base, models, weights=weights)
    assert torch.equal(merged_in_pieces(task_arithmetic, base, models, [1, 2, 70, 513], weights=weights), whole)
