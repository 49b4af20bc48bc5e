"""Iso-C and Iso-CTS against reference results and the identities they must fulfil."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neurocl.errors import UserError
from neurocl.merging.iso import iso_c, iso_cts, split_ranks, subspace_alignment
from neurocl.merging.linear_algebra import polar
from tests.conftest import reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def delta(tasks: Tensor, merge: Any = iso_c, **options: Any) -> Tensor:
    base = random(*tasks.shape[1:], seed=99)
    return merge(base, base + tasks, **options) - base


def matrices(data: dict[str, Any], outputs: str, excluded: str = "text_projection") -> list[tuple[Tensor, np.ndarray]]:
    """Stacked task matrices [T, m, n] and the expected merged one, for every parameter that counts as a matrix."""
    found = []
    for key, expected in data.items():
        name = key.removeprefix(f"{outputs}/")
        if key != name and expected.ndim == 2 and excluded not in name:
            tasks = [torch.from_numpy(data[f"in/tv{task}/{name}"]) for task in range(int(data["T"]))]
            found.append((torch.stack(tasks), expected))
    assert found
    return found


def merged64(merge: Any, tasks: Tensor, **options: Any) -> np.ndarray:
    tasks = tasks.double()
    return merge(torch.zeros_like(tasks[0]), tasks, **options).numpy()


def test_iso_c_reproduces_the_reference() -> None:
    data = reference("merging-iso/iso_c")
    for tasks, expected in matrices(data, "out64"):
        np.testing.assert_allclose(merged64(iso_c, tasks), expected, rtol=1e-8, atol=1e-10)
    for tasks, expected in matrices(data, "out32"):
        merged = iso_c(torch.zeros_like(tasks[0]), tasks).numpy()
        assert merged.dtype == np.float32
        assert np.linalg.norm(merged - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("fraction", [0.8, 0.5, 1.0])
def test_iso_cts_reproduces_the_reference(fraction: float) -> None:
    for tasks, expected in matrices(reference("merging-iso/iso_cts"), f"out64_frac{fraction}"):
        np.testing.assert_allclose(merged64(iso_cts, tasks, common_fraction=fraction), expected, rtol=1e-8, atol=1e-10)


def test_iso_cts_in_float32_stays_near_the_reference() -> None:
    for tasks, expected in matrices(reference("merging-iso/iso_cts"), "out32_frac0.8"):
        merged = iso_cts(torch.zeros_like(tasks[0]), tasks).numpy()
        assert np.linalg.norm(merged - expected) <= 1e-3 * np.linalg.norm(expected)


def test_flattening_the_mean_instead_of_the_sum_divides_iso_c_by_the_number_of_tasks() -> None:
    data = reference("merging-tak-kfac/tak_merging")
    for tasks, expected in matrices(data, "out_iso_alpha1", excluded="nothing is"):
        np.testing.assert_allclose(merged64(iso_c, tasks) / len(tasks), expected, rtol=0, atol=1e-9)


def test_iso_c_of_two_diagonal_tasks_by_hand() -> None:
    tasks = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]).double()
    torch.testing.assert_close(iso_c(torch.zeros(2, 2).double(), tasks), 2 * torch.eye(2).double())


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
@pytest.mark.parametrize("shape", [(3, 12, 7), (3, 7, 12), (3, 10, 10)])
def test_all_singular_values_of_the_result_are_equal(merge: Any, shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(delta(random(*shape), merge))
    torch.testing.assert_close(values, values.mean().expand_as(values))


def test_iso_c_keeps_the_nuclear_norm_and_does_not_raise_the_frobenius_norm() -> None:
    tasks = random(4, 9, 6)
    total, merged = tasks.sum(dim=0), delta(tasks)
    torch.testing.assert_close(torch.linalg.svdvals(merged).sum(), torch.linalg.svdvals(total).sum())
    torch.testing.assert_close(torch.linalg.svdvals(merged).mean(), torch.linalg.svdvals(total).mean())
    assert merged.norm() < total.norm()


def test_orthogonal_tasks_of_equal_strength_that_fill_the_space_are_summed() -> None:
    left, right = orthogonal(5, 1), orthogonal(5, 2)
    tasks = 0.3 * torch.einsum("it,jt->tij", left, right)
    torch.testing.assert_close(delta(tasks), tasks.sum(dim=0))


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
def test_orthogonal_tasks_that_do_not_fill_the_space_are_summed_with_a_rank_tolerance(merge: Any) -> None:
    left, right = orthogonal(9, 1)[:, :3], orthogonal(7, 2)[:, :3]
    tasks = 0.3 * torch.einsum("it,jt->tij", left, right)
    torch.testing.assert_close(delta(tasks, merge, rank_tolerance=1e-6), tasks.sum(dim=0))


def test_a_multiple_of_a_semi_orthogonal_matrix_is_left_alone() -> None:
    matrix = 0.7 * polar(random(8, 5))[0]
    torch.testing.assert_close(delta(matrix.unsqueeze(0)), matrix)


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8)])
def test_iso_c_of_its_own_result_returns_it(shape: tuple[int, ...]) -> None:
    once = delta(random(*shape))
    torch.testing.assert_close(delta(once.unsqueeze(0)), once)


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
def test_rotating_all_tasks_rotates_the_result(merge: Any) -> None:
    tasks, left, right = random(3, 10, 8), orthogonal(10, 1), orthogonal(8, 2)
    torch.testing.assert_close(delta(left @ tasks @ right, merge), left @ delta(tasks, merge) @ right)


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
def test_scaling_all_tasks_scales_the_result(merge: Any) -> None:
    tasks = random(3, 10, 8)
    torch.testing.assert_close(delta(1e-3 * tasks, merge), 1e-3 * delta(tasks, merge), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
def test_the_order_of_the_tasks_does_not_matter(merge: Any) -> None:
    tasks = random(4, 10, 8)
    torch.testing.assert_close(delta(tasks[[2, 0, 3, 1]], merge), delta(tasks, merge))


@pytest.mark.parametrize("shape", [(3, 10, 8), (3, 8, 10)])
def test_iso_cts_without_task_specific_directions_is_iso_c(shape: tuple[int, ...]) -> None:
    tasks = random(*shape)
    torch.testing.assert_close(delta(tasks, iso_cts, common_fraction=1.0), delta(tasks))


def test_iso_cts_of_one_task_is_iso_c() -> None:
    tasks = random(1, 10, 8)
    torch.testing.assert_close(delta(tasks, iso_cts, common_fraction=0.5), delta(tasks))


def test_with_more_tasks_than_directions_iso_cts_is_iso_c() -> None:
    tasks = random(9, 10, 4)
    torch.testing.assert_close(delta(tasks, iso_cts, common_fraction=0.1), delta(tasks))


def test_iso_cts_keeps_the_directions_of_a_weak_task() -> None:
    left, right = orthogonal(8, 1), orthogonal(8, 2)
    strong = left[:, :7] * torch.linspace(2, 1, 7, dtype=torch.float64) @ right[:, :7].mT
    weak = 0.01 * torch.outer(left[:, 7], right[:, 7])
    merged = delta(torch.stack([strong, weak]), iso_cts, common_fraction=0.75)
    assert float(left[:, 7] @ merged @ right[:, 7] / torch.linalg.svdvals(merged)[0]) > 0.99


def test_the_randomized_solver_agrees_with_the_exact_one() -> None:
    tasks = torch.stack([random(60, 3, seed=t) @ random(3, 50, seed=t + 9) for t in range(3)])
    tasks += 1e-3 * random(3, 60, 50, seed=30)
    exact = delta(tasks, iso_cts, common_fraction=0.82)
    torch.testing.assert_close(
        delta(tasks, iso_cts, common_fraction=0.82, svd="randomized"), exact, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("rank", "num_tasks", "fraction", "mode", "expected"),
    [
        (768, 20, 0.8, "round", (608, 8)),
        (768, 20, 0.8, "floor", (628, 7)),
        (768, 8, 0.8, "round", (616, 19)),
        (12, 3, 0.5, "round", (6, 2)),
        (5, 2, 0.0, "round", (1, 2)),
        (3, 2, 0.0, "round", (1, 1)),  # 1.5 rounds to 2, two tasks of rank 2 would not fit
        (10, 4, 0.0, "round", (2, 2)),
        (4, 9, 0.0, "round", (4, 0)),
        (7, 3, 1.0, "round", (7, 0)),
    ],
)
def test_directions_are_split_as_published_and_never_overshoot(
    rank: int, num_tasks: int, fraction: float, mode: Any, expected: tuple[int, int]
) -> None:
    assert split_ranks(rank, num_tasks, fraction, mode) == expected


def test_the_spectrum_can_be_flattened_part_of_the_way() -> None:
    tasks = random(3, 9, 6)
    total = tasks.sum(dim=0)
    torch.testing.assert_close(delta(tasks, flatten=0.0), total)
    values, found = torch.linalg.svdvals(total), torch.linalg.svdvals(delta(tasks, flatten=0.3))
    torch.testing.assert_close(found, 0.7 * values + 0.3 * values.mean())


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
def test_weights_scale_the_tasks(merge: Any) -> None:
    tasks, weights = random(3, 9, 6), torch.tensor([0.5, 2.0, -1.0])
    torch.testing.assert_close(
        delta(tasks, merge, weights=weights), delta(weights.double()[:, None, None] * tasks, merge)
    )


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
@pytest.mark.parametrize("shape", [(2, 6, 4), (1, 1, 5), (2, 1, 1), (3, 0, 4)])
def test_tasks_that_change_nothing_give_the_base(merge: Any, shape: tuple[int, ...]) -> None:
    base = random(*shape[1:])
    assert torch.equal(merge(base, base.expand(shape)), base)


@pytest.mark.parametrize("merge", [iso_c, iso_cts])
def test_tasks_that_cancel_or_lack_rank_give_finite_numbers(merge: Any) -> None:
    task = random(6, 4)
    assert delta(torch.stack([task, -task]), merge).isfinite().all()
    assert delta(torch.outer(random(6), random(4)).unsqueeze(0), merge).isfinite().all()
    assert delta(torch.stack([task, torch.zeros_like(task)]), merge).isfinite().all()


def test_a_stack_of_matrices_is_merged_matrix_by_matrix() -> None:
    base, models = random(5, 7, 4), random(3, 5, 7, 4, seed=1)
    merged = iso_c(base, models, rank_tolerance=1e-9)
    for index in range(5):
        torch.testing.assert_close(merged[index], iso_c(base[index], models[:, index]))


def test_options_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="common_fraction"):
        iso_cts.merge.resolve({"common_fraction": 1.5})  # type: ignore[attr-defined]
    assert iso_c.merge.resolve({}) == {"flatten": 1.0, "rank_tolerance": 0.0}  # type: ignore[attr-defined]


def test_a_task_aligns_fully_with_a_merged_matrix_that_has_its_directions() -> None:
    task = random(8, 5)
    assert subspace_alignment(task, task, threshold=0.999999) == pytest.approx(1)
    left, right = orthogonal(6, 1), orthogonal(6, 2)
    first, second = torch.outer(left[:, 0], right[:, 0]), torch.outer(left[:, 1], right[:, 1])
    assert subspace_alignment(first, second) == pytest.approx(0, abs=1e-12)
    assert subspace_alignment(3 * first + 4 * second, first) == pytest.approx(0.6)


def test_the_dominant_subspace_is_the_smallest_that_holds_95_percent() -> None:
    merged = torch.diag(torch.tensor([0.94, 0.3, 0.1, 0.05]).double())
    task = torch.eye(4, dtype=torch.float64)
    assert subspace_alignment(task, merged) == pytest.approx(math.sqrt(2 / 4))
    flat = torch.eye(20, dtype=torch.float64)
    assert subspace_alignment(flat, flat) == pytest.approx(math.sqrt(19 / 20))


def test_flattening_raises_the_alignment_of_a_weak_task() -> None:
    left, right = orthogonal(20, 1), orthogonal(20, 2)
    strong = left * torch.logspace(0, -1.5, 20, dtype=torch.float64) @ right.mT
    weak = 0.05 * random(20, 20)
    total = strong + weak
    merged = delta(torch.stack([strong, weak]))
    assert subspace_alignment(weak, merged) > subspace_alignment(weak, total)


def test_alignment_with_or_of_nothing() -> None:
    task, zero = random(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    assert subspace_alignment(task, zero) == 0
    assert math.isnan(subspace_alignment(zero, task))
