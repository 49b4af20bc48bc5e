"""Polar factors, truncated SVDs, bases and positive semi-definite systems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurocl.merging.linear_algebra import column_basis, polar, solve_psd, truncated_svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with the given singular values, and its polar factor."""
    left = torch.linalg.qr(random(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(random(columns, len(values), seed=seed + 1)).Q
    return left * values @ right.mT, left @ right.mT


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30), (1, 5), (5, 1), (1, 1)])
def test_the_polar_factor_is_that_of_the_svd(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    factor, found = polar(matrix)
    assert relative(factor, left @ right) < 1e-10
    torch.testing.assert_close(found, values, rtol=1e-10, atol=0)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("decay", ["geometric", "one large"])
def test_the_polar_factor_keeps_ten_digits_at_any_condition_number(condition: float, decay: str) -> None:
    values = torch.logspace(0, -1, 60, base=condition, dtype=torch.float64)
    if decay == "one large":
        values[1:] = (1 + torch.rand(59, generator=torch.Generator().manual_seed(2))) / condition
    matrix, expected = with_spectrum(90, 60, values)
    # The condition of the problem itself is that of the matrix: the last digits of its entries decide.
    assert relative(polar(matrix)[0], expected) < max(1e-11, 1e-15 * condition)
    torch.testing.assert_close(polar(matrix)[1], values.sort(descending=True).values, rtol=1e-8, atol=1e-15)


def test_a_matrix_without_full_rank_falls_back_to_the_svd() -> None:
    matrix, expected = with_spectrum(20, 12, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    factor, values = polar(matrix)
    torch.testing.assert_close(factor.mT @ factor, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(values[:3], torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    partial, _ = polar(matrix, rank_tolerance=1e-9)
    torch.testing.assert_close(partial, expected)


def test_a_batch_gives_what_its_matrices_give_alone() -> None:
    easy, hard, deficient = random(8, 5), with_spectrum(8, 5, torch.logspace(0, -4, 5).double())[0], random(8, 5)
    deficient[:, 4] = deficient[:, 3]
    batch = torch.stack([easy, hard, deficient, torch.zeros(8, 5, dtype=torch.float64)])
    factors, values = polar(batch)
    for matrix, factor, found in zip(batch, factors, values, strict=True):
        torch.testing.assert_close(factor, polar(matrix)[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, polar(matrix)[1], rtol=1e-10, atol=1e-10)
    assert polar(batch.mT)[0].shape == (4, 5, 8)


def test_a_polar_factor_is_its_own_polar_factor() -> None:
    factor, _ = polar(random(9, 6))
    again, values = polar(factor)
    torch.testing.assert_close(again, factor)
    torch.testing.assert_close(values, torch.ones(6, dtype=torch.float64))


def test_float32_comes_back_as_float32_with_float64_accuracy() -> None:
    matrix = random(30, 20).float()
    factor, _ = polar(matrix)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, polar(matrix.double())[0].float(), rtol=0, atol=0)


def test_empty_matrices_have_empty_factors() -> None:
    factor, values = polar(torch.empty(3, 0))
    assert factor.shape == (3, 0)
    assert values.shape == (0,)


def test_polar_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match="a matrix expected"):
        polar(torch.ones(3))


@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (3, 60, 80)])
def test_the_randomized_svd_finds_the_leading_triplets(shape: tuple[int, ...]) -> None:
    matrix = random(*shape[:-1], 6) @ random(*shape[:-2], 6, shape[-1], seed=1) + 1e-3 * random(*shape, seed=2)
    exact = truncated_svd(matrix, 6)
    found = truncated_svd(matrix, 6, svd="randomized")
    torch.testing.assert_close(found[1], exact[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        (found[0] * found[1].unsqueeze(-2)) @ found[2], (exact[0] * exact[1].unsqueeze(-2)) @ exact[2]
    )


def test_the_randomized_svd_repeats_with_its_seed() -> None:
    matrix = random(70, 50)
    first, second = truncated_svd(matrix, 4, svd="randomized"), truncated_svd(matrix, 4, svd="randomized")
    other = truncated_svd(matrix, 4, svd="randomized", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_truncated_svd_has_no_more_triplets_than_the_matrix() -> None:
    left, values, right = truncated_svd(random(4, 3), 10, svd="randomized")
    assert (left.shape, values.shape, right.shape) == ((4, 3), (3,), (3, 3))
    assert truncated_svd(random(4, 3), 0)[0].shape == (4, 0)
    with pytest.raises(ValueError, match="rank must be at least 0"):
        truncated_svd(random(4, 3), -1)


def test_the_column_basis_has_the_rank_of_the_matrix() -> None:
    matrix = random(10, 3) @ random(3, 6, seed=1)
    basis = column_basis(matrix)
    assert basis.shape == (10, 3)
    torch.testing.assert_close(basis @ (basis.mT @ matrix), matrix)
    assert column_basis(torch.zeros(10, 4)).shape == (10, 0)


def psd(size: int, rank: int, seed: int = 0) -> Tensor:
    rows = random(rank, size, seed=seed)
    return rows.mT @ rows


def test_a_regular_system_is_solved_exactly() -> None:
    system, expected = psd(6, 20), random(6, 4, seed=1)
    torch.testing.assert_close(solve_psd(system, system @ expected), expected, rtol=1e-9, atol=1e-9)


def test_the_ridge_is_relative_to_the_mean_of_the_diagonal() -> None:
    system, right = psd(6, 3), random(6, 2, seed=1)
    regular = system + 1e-3 * system.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(solve_psd(system, right, ridge=1e-3), torch.linalg.solve(regular, right))
    torch.testing.assert_close(solve_psd(1e6 * system, 1e6 * right, ridge=1e-3), solve_psd(system, right, ridge=1e-3))


def test_without_a_ridge_unseen_directions_get_zero() -> None:
    system, right = psd(6, 3), random(6, 2, seed=1)
    torch.testing.assert_close(solve_psd(system, right), torch.linalg.pinv(system, rtol=1e-10, hermitian=True) @ right)
    assert not solve_psd(torch.zeros(3, 3), torch.ones(3, 2)).any()
    assert not solve_psd(torch.zeros(3, 3), torch.ones(3, 2), ridge=0.1).any()


def test_where_cholesky_fails_in_a_batch_the_pseudo_inverse_takes_over() -> None:
    systems = torch.stack([psd(5, 9), torch.zeros(5, 5, dtype=torch.float64), psd(5, 9, seed=3)])
    rights = random(3, 5, 2, seed=1)
    solved = solve_psd(systems, rights, ridge=1e-6)
    for system, right, solution in zip(systems, rights, solved, strict=True):
        torch.testing.assert_close(solution, solve_psd(system, right, ridge=1e-6))


def test_inputs_are_left_alone_and_the_dtype_is_kept() -> None:
    system, right = psd(4, 8).float(), random(4, 2).float()
    before = system.clone()
    assert solve_psd(system, right, ridge=0.1).dtype == torch.float32
    assert torch.equal(system, before)


def test_a_system_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected, got"):
        solve_psd(torch.ones(3, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match="ridge"):
        solve_psd(torch.ones(3, 3), torch.ones(3, 1), ridge=-1)
