"""The weighted average of models."""

from __future__ import annotations

import pytest
import torch

from neurocl.errors import UserError
from neurocl.merging.average import average
from tests.merging.pieces import merged_in_pieces, random_models


def test_one_model_is_returned_whatever_its_weight() -> None:
    base, models = random_models(1, 4, 5)
    assert torch.equal(average(base, models), models[0])
    assert torch.equal(average(base, models, weights=torch.tensor([0.3])), models[0])


def test_it_is_the_mean_of_the_models() -> None:
    base, models = random_models(4, 6, 5)
    torch.testing.assert_close(average(base, models), models.mean(dim=0), rtol=1e-15, atol=1e-15)


def test_only_the_ratios_of_the_weights_matter() -> None:
    base, models = random_models(3, 6, 5)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    expected = (models[0] + 2 * models[1] + 5 * models[2]) / 8
    torch.testing.assert_close(average(base, models, weights=weights), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(average(base, models, weights=weights * 8), expected, rtol=1e-14, atol=1e-15)


def test_identical_models_are_returned() -> None:
    base, models = random_models(1, 50)
    assert torch.equal(average(base, models.expand(4, -1)), models[0])


def test_it_equals_the_base_plus_the_mean_task_vector() -> None:
    base, models = random_models(3, 40)
    torch.testing.assert_close(average(base, models), base + (models - base).sum(0) / 3, rtol=1e-14, atol=1e-15)


def test_weights_that_cancel_are_refused() -> None:
    base, models = random_models(2, 3)
    with pytest.raises(UserError, match="sum that is not zero"):
        average(base, models, weights=torch.tensor([1.0, -1.0]))


def test_the_order_of_the_models_does_not_matter() -> None:
    base, models = random_models(4, 100)
    torch.testing.assert_close(average(base, models), average(base, models[[2, 0, 3, 1]]), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 0.3, 0.9])])
def test_pieces_give_the_bits_of_the_whole(weights: torch.Tensor | None) -> None:
    base, models = random_models(3, 1003)
    whole = average(base, models, weights=weights)
    assert torch.equal(merged_in_pieces(average, base, models, [1, 2, 70, 513], weights=weights), whole)


def test_empty_tensors_pass() -> None:
    assert average(torch.empty(0), torch.empty(2, 0)).shape == (0,)
