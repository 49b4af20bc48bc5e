"""RegMean against joint least squares, the reference arrays and what must hold exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurocl.merging.regmean import merge_responses, regmean, shrunk
from tests.conftest import reference


def problem(rows: tuple[int, ...] = (40, 25, 30), o: int = 4, d: int = 6) -> tuple[Tensor, list[Tensor], Tensor]:
    """Models [N, o, d], their inputs and mean Gram matrices [N, d, d]."""
    torch.manual_seed(1)
    models = torch.randn(len(rows), o, d, dtype=torch.float64)
    inputs = [torch.randn(n, d, dtype=torch.float64) for n in rows]
    return models, inputs, torch.stack([x.T @ x / len(x) for x in inputs])


def test_the_reference_arrays_are_met() -> None:
    arrays = {key: torch.as_tensor(value).double() for key, value in reference("merging-baselines/regmean").items()}
    for name in ("a.weight", "b.weight"):
        models = torch.stack([arrays[f"base/{name}"] + arrays[f"tv{t}/{name}"] for t in range(3)])
        gram = torch.stack([arrays[f"x/gram/{t}/{name}"] for t in range(3)])
        for factor in ("1.0", "0.95", "0.9"):
            merged = regmean(models[0], models, gram=gram, off_diagonal=float(factor))
            expected = arrays[f"x/out_alpha{factor}/{name}"]
            assert float((merged - expected).norm() / expected.norm()) < 1e-6


def test_it_is_the_joint_least_squares_solution() -> None:
    models, inputs, _ = problem()
    sums = torch.stack([x.T @ x for x in inputs])
    targets = torch.cat([x @ w.T for x, w in zip(inputs, models, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), targets).solution.T
    torch.testing.assert_close(regmean(models[0], models, gram=sums, off_diagonal=1.0), expected)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_identical_models_and_a_single_one_are_returned_bit_for_bit(off_diagonal: float, ridge: float) -> None:
    models, _, gram = problem()
    for same, grams in ((models[:1].expand(3, -1, -1), gram), (models[:1], gram[:1])):
        merged = regmean(models[0], same, gram=grams, off_diagonal=off_diagonal, ridge=ridge)
        assert torch.equal(merged, models[0])


def test_equal_grams_give_the_plain_mean() -> None:
    models, _, gram = problem()
    merged = regmean(models[0], models, gram=gram[:1].expand(3, -1, -1))
    torch.testing.assert_close(merged, models.mean(0))


def test_neither_the_scale_of_all_grams_nor_the_order_of_models_matters() -> None:
    models, _, gram = problem()
    weights = torch.tensor([1.0, 2.0, 0.5])
    merged = regmean(models[0], models, gram=gram, weights=weights)
    torch.testing.assert_close(regmean(models[0], models, gram=7 * gram, weights=weights), merged)
    order = [2, 0, 1]
    turned = regmean(models[0], models[order], gram=gram[order], weights=weights[order])
    torch.testing.assert_close(turned, merged)


def test_models_with_disjoint_inputs_keep_their_own_columns() -> None:
    models, inputs, _ = problem(rows=(40, 25))
    inputs[0][:, 3:] = 0
    inputs[1][:, :3] = 0
    gram = torch.stack([x.T @ x for x in inputs])
    for off_diagonal in (0.0, 0.9):
        merged = regmean(models[0], models, gram=gram, off_diagonal=off_diagonal)
        torch.testing.assert_close(merged, torch.cat([models[0][:, :3], models[1][:, 3:]], 1))


def test_an_input_that_no_data_reach_gets_the_mean() -> None:
    models, inputs, _ = problem()
    for x in inputs:
        x[:, 2] = 0
    gram = torch.stack([x.T @ x for x in inputs])
    for options in ({}, {"ridge": 1e-3}, {"off_diagonal": 0.0}):
        merged = regmean(models[0], models, gram=gram, **options)
        torch.testing.assert_close(merged[:, 2], models.mean(0)[:, 2])
    assert torch.equal(
        regmean(models[0], models, gram=torch.zeros_like(gram)), models[0] + (models - models[0]).mean(0)
    )


def test_a_large_ridge_gives_the_mean() -> None:
    models, _, gram = problem()
    torch.testing.assert_close(regmean(models[0], models, gram=gram, ridge=1e12), models.mean(0))


def test_diagonals_alone_equal_an_off_diagonal_of_zero() -> None:
    models, _, gram = problem()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    merged = regmean(models[0], models, gram=gram, off_diagonal=0.0)
    assert torch.equal(regmean(models[0], models, gram=diagonal), merged)
    full = regmean(models[0], models, gram=torch.diag_embed(diagonal), off_diagonal=1.0)
    torch.testing.assert_close(merged, full)
    expected = (models * diagonal.unsqueeze(1)).sum(0) / diagonal.sum(0)
    torch.testing.assert_close(merged, expected)


def test_cross_grams_solve_for_targets_on_other_inputs() -> None:
    models, own, _ = problem()
    seen = [x + 0.3 * torch.randn_like(x) for x in own]
    grams = torch.stack([x.T @ x for x in seen])
    crosses = torch.stack([x.T @ y for x, y in zip(own, seen, strict=True)])
    targets = torch.cat([x @ w.T for x, w in zip(own, models, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(seen), targets).solution.T
    torch.testing.assert_close(merge_responses(models, grams, crosses=crosses), expected)


def test_perturbing_the_solution_never_lowers_the_objective() -> None:
    models, inputs, gram = problem()
    merged = regmean(models[0], models, gram=gram, off_diagonal=1.0)

    def objective(weight: Tensor) -> float:
        errors = [((x @ (weight - w).T) ** 2).sum() / len(x) for x, w in zip(inputs, models, strict=True)]
        return float(torch.stack(errors).sum())

    lowest = objective(merged)
    assert all(objective(merged + 0.01 * torch.randn_like(merged)) > lowest for _ in range(20))


def test_shrinking_leaves_the_diagonal_alone() -> None:
    _, _, gram = problem()
    small = shrunk(gram, 0.5)
    assert torch.equal(small.diagonal(dim1=1, dim2=2), gram.diagonal(dim1=1, dim2=2))
    assert torch.equal(small[:, 0, 1], 0.5 * gram[:, 0, 1])
    assert torch.equal(shrunk(gram, 1.0), gram)


def test_grams_of_another_size_are_refused() -> None:
    models, _, gram = problem()
    with pytest.raises(ValueError, match="Gram matrices"):
        regmean(models[0], models, gram=gram[:, :3, :3])
