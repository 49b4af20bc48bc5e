"""Model stock."""

from __future__ import annotations

import pytest
import torch

from neurocl.errors import UserError
from neurocl.merging.method import measured_on
from neurocl.merging.model_stock import ModelStockMeasurement, model_stock, stock_ratio
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models


@pytest.mark.parametrize("name", ["a.weight", "a.bias", "b.weight", "ln.weight"])
def test_reference_values_are_reproduced(name: str) -> None:
    stored = reference("merging-baselines/model_stock")
    base = torch.from_numpy(stored[f"base/{name}"]).double()
    models = torch.stack([base + torch.from_numpy(stored[f"tv{task}/{name}"]).double() for task in range(3)])
    measured = measured_on(ModelStockMeasurement(3), base, models)
    assert measured.cosine == pytest.approx(float(stored[f"x/cos/{name}"]), rel=1e-10)
    assert stock_ratio(measured.cosine, 3) == pytest.approx(float(stored[f"x/ratio/{name}"]), rel=1e-10)
    expected = torch.from_numpy(stored[f"x/out/{name}"])
    torch.testing.assert_close(model_stock(base, models), expected, rtol=1e-10, atol=0)


def test_identical_models_are_returned() -> None:
    base, models = random_models(1, 300)
    torch.testing.assert_close(model_stock(base, models.expand(4, -1)), models[0], rtol=1e-14, atol=1e-14)


def test_orthogonal_task_vectors_give_the_base() -> None:
    base = torch.randn(4, dtype=torch.float64)
    assert torch.equal(model_stock(base, base + torch.eye(4, dtype=torch.float64)[:3].mul(2)), base)


def test_task_vectors_that_cancel_give_the_base() -> None:
    base, models = random_models(1, 100)
    opposite = torch.stack([models[0], 2 * base - models[0]])
    torch.testing.assert_close(model_stock(base, opposite), base, rtol=0, atol=1e-12)


def test_models_equal_to_the_base_give_the_base() -> None:
    base, models = random_models(2, 100)
    torch.testing.assert_close(model_stock(base, base.expand(3, -1)), base, rtol=1e-15, atol=1e-15)
    one_moved = torch.stack([models[0], base])
    assert torch.equal(model_stock(base, one_moved), base)


def test_the_order_of_the_models_does_not_matter() -> None:
    base, models = random_models(4, 500)
    torch.testing.assert_close(model_stock(base, models), model_stock(base, models[[2, 0, 3, 1]]))


def test_pieces_give_the_bits_of_the_whole() -> None:
    base, models = random_models(3, 10_007)
    whole = model_stock(base, models)
    assert torch.equal(merged_in_pieces(model_stock, base, models, [1, 5, 4096, 4097, 9000]), whole)


def test_one_model_is_refused() -> None:
    base, models = random_models(1, 4)
    with pytest.raises(UserError, match="at least 2 models, got 1"):
        model_stock(base, models)


def test_empty_tensors_pass() -> None:
    assert model_stock(torch.empty(0), torch.empty(2, 0)).shape == (0,)
