"""Fisher merging against the reference arrays and what must hold exactly."""

from __future__ import annotations

import pytest
import torch

from neurocl.errors import UserError
from neurocl.merging.fisher import fisher_merging, fisher_weights
from neurocl.merging.statistics import Statistics
from tests.conftest import reference


@pytest.mark.parametrize("normalised", [False, True])
def test_the_reference_arrays_are_met(normalised: bool) -> None:
    file = reference("merging-baselines/fisher_merging")
    arrays = {key: torch.as_tensor(value).double() for key, value in file.items()}
    names = [key.removeprefix("base/") for key in arrays if key.startswith("base/")]
    statistics = []
    for t in range(3):
        own = Statistics()
        for name in names:
            own.add("fisher", name, arrays[f"x/fisher/{t}/{name}"], num_samples=1)
        statistics.append(own)
    weights = fisher_weights(statistics) if normalised else None
    for name in names:
        models = torch.stack([arrays[f"base/{name}"] + arrays[f"tv{t}/{name}"] for t in range(3)])
        fisher = torch.stack([own.mean("fisher", name) for own in statistics])
        merged = fisher_merging(models[0], models, fisher=fisher, weights=weights)
        expected = arrays[f"x/out_norm{int(normalised)}/{name}"]
        assert float((merged - expected).norm() / expected.norm()) < 1e-6


def test_identical_models_and_a_single_one_are_returned_bit_for_bit() -> None:
    model, fisher = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 3, 4, dtype=torch.float64)
    assert torch.equal(fisher_merging(model, model.expand(3, 3, 4), fisher=fisher), model)
    assert torch.equal(fisher_merging(model, model[None], fisher=fisher[:1]), model)


def test_equal_or_absent_information_gives_the_mean() -> None:
    models = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(fisher_merging(models[0], models, fisher=torch.ones(3, 5)), models.mean(0))
    for floor in (0.0, 1e-6):
        merged = fisher_merging(models[0], models, fisher=torch.zeros(3, 5), floor=floor)
        torch.testing.assert_close(merged, models.mean(0))


def test_the_only_sure_model_decides_an_entry() -> None:
    models = torch.randn(2, 4, dtype=torch.float64)
    fisher = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    merged = fisher_merging(models[0], models, fisher=fisher, floor=0.0)
    torch.testing.assert_close(merged, torch.where(fisher[0] > 0, models[0], models[1]))


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("count", [3, 9, 17])
def test_slices_give_the_same_bits_as_the_whole(count: int, size: int) -> None:
    models, fisher = torch.randn(count, 50, dtype=torch.float64), torch.rand(count, 50, dtype=torch.float64)
    weights = torch.rand(count)
    whole = fisher_merging(models[0], models, fisher=fisher, weights=weights)
    pieces = [
        fisher_merging(
            models[0, a : a + size], models[:, a : a + size], fisher=fisher[:, a : a + size], weights=weights
        )
        for a in range(0, 50, size)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_weights_undo_a_common_factor_on_the_information_of_one_model() -> None:
    fishers = torch.rand(2, 6, dtype=torch.float64)
    models = torch.randn(2, 6, dtype=torch.float64)

    def merged(scale: float) -> torch.Tensor:
        statistics = []
        for index, factor in enumerate((scale, 1.0)):
            own = Statistics()
            own.add("fisher", "w", factor * fishers[index], num_samples=1)
            statistics.append(own)
        information = torch.stack([own.mean("fisher", "w") for own in statistics])
        weights = fisher_weights(statistics)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0).double())
        return fisher_merging(models[0], models, fisher=information, weights=weights, floor=0.0)

    torch.testing.assert_close(merged(100.0), merged(1.0))


def test_weights_need_information() -> None:
    with pytest.raises(UserError, match="model 1"):
        fisher_weights([Statistics()])
