"""TSV-Merge against reference results and the identities it must fulfil, and the interference measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from neurocl.merging.tsv import singular_task_interference, task_singular_vectors, tsv_merge
from tests.conftest import reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def delta(tasks: Tensor, **options: object) -> Tensor:
    base = random(*tasks.shape[1:], seed=99)
    return tsv_merge(base, base + tasks, **options) - base  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "outputs", "excluded", "tolerance"),
    [
        ("merging-iso/tsv_m", "out64", "text_projection", {"rtol": 1e-8, "atol": 1e-10}),
        ("merging-tak-kfac/tak_merging", "out_tsv_alpha1", "nothing is", {"rtol": 0, "atol": 1e-9}),
    ],
)
def test_tsv_merge_reproduces_the_references(
    file: str, outputs: str, excluded: str, tolerance: dict[str, float]
) -> None:
    data = reference(file)
    names = [key.partition("/")[2] for key in data if key.startswith(f"{outputs}/")]
    names = [name for name in names if data[f"{outputs}/{name}"].ndim == 2 and excluded not in name]
    assert len(names) >= 5
    for name in names:
        tasks = torch.stack([torch.from_numpy(data[f"in/tv{task}/{name}"]) for task in range(int(data["T"]))]).double()
        merged = tsv_merge(torch.zeros_like(tasks[0]), tasks)
        np.testing.assert_allclose(merged.numpy(), data[f"{outputs}/{name}"], **tolerance)


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (1, 4)])
def test_merging_one_model_returns_it(shape: tuple[int, int]) -> None:
    task = random(*shape)
    torch.testing.assert_close(delta(task.unsqueeze(0)), task)


def test_one_model_without_full_rank_is_returned_too() -> None:
    task = random(8, 2) @ random(2, 6, seed=1)
    torch.testing.assert_close(delta(task.unsqueeze(0)), task)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tasks_in_orthogonal_subspaces_are_summed(rank: int) -> None:
    left, right = orthogonal(10, 1), orthogonal(9, 2)
    tasks = torch.stack(
        [
            left[:, 3 * t : 3 * t + rank] * torch.arange(1.0, rank + 1).double() @ right[:, 3 * t : 3 * t + rank].mT
            for t in range(3)
        ]
    )
    torch.testing.assert_close(delta(tasks), tasks.sum(dim=0))


def test_identical_experts_give_the_truncated_expert() -> None:
    task = random(8, 6)
    left, values, right = torch.linalg.svd(task, full_matrices=False)
    truncated = left[:, :3] * values[:3] @ right[:3]
    torch.testing.assert_close(delta(torch.stack([task, task])), truncated)


def test_a_task_that_changes_nothing_only_takes_its_share_of_the_rank() -> None:
    task = random(8, 6)
    left, values, right = torch.linalg.svd(task, full_matrices=False)
    merged = delta(torch.stack([task, torch.zeros_like(task)]))
    torch.testing.assert_close(merged, left[:, :3] * values[:3] @ right[:3])


def test_rotating_all_tasks_rotates_the_result() -> None:
    tasks, left, right = random(3, 10, 8), orthogonal(10, 1), orthogonal(8, 2)
    torch.testing.assert_close(delta(left @ tasks @ right), left @ delta(tasks) @ right)


def test_scaling_all_tasks_scales_the_result_and_their_order_does_not_matter() -> None:
    tasks = random(3, 10, 8)
    torch.testing.assert_close(delta(1e-3 * tasks), 1e-3 * delta(tasks), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(delta(tasks[[1, 2, 0]]), delta(tasks))


def test_weights_scale_the_tasks() -> None:
    tasks, weights = random(2, 9, 6), torch.tensor([0.5, -2.0])
    torch.testing.assert_close(delta(tasks, weights=weights), delta(weights.double()[:, None, None] * tasks))


def test_the_randomized_solver_agrees_with_the_exact_one() -> None:
    tasks = torch.stack([random(80, 3, seed=t) @ random(3, 70, seed=t + 9) for t in range(4)])
    tasks += 1e-3 * random(4, 80, 70, seed=30)
    exact = delta(tasks, rank_fraction=3.1 / 70)
    torch.testing.assert_close(delta(tasks, rank_fraction=3.1 / 70, svd="randomized"), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 6, 4), (1, 1, 5), (5, 3, 2), (3, 0, 4)])
def test_tasks_that_change_nothing_give_the_base(shape: tuple[int, ...]) -> None:
    base = random(*shape[1:])
    assert torch.equal(tsv_merge(base, base.expand(shape)), base)


def test_more_tasks_than_directions_keep_one_direction_each() -> None:
    tasks = random(5, 7, 3)
    left, values, right = task_singular_vectors(tasks)
    assert (left.shape, values.shape, right.shape) == ((7, 5), (5,), (5, 3))
    merged = delta(tasks)
    assert merged.isfinite().all()
    assert torch.linalg.svdvals(merged)[0] <= values.max() * (1 + 1e-12)


def test_orthogonal_tasks_do_not_interfere_and_equal_ones_do() -> None:
    left, right = orthogonal(6, 1), orthogonal(6, 2)
    apart = torch.stack([left[:, :3] @ right[:, :3].mT, left[:, 3:] @ right[:, 3:].mT])
    assert singular_task_interference(apart) == pytest.approx(0, abs=1e-12)
    one = torch.outer(left[:, 0], right[:, 0])
    # U^T U - I and V^T V - I both swap the two triplets, so what remains is the diagonal of singular values.
    assert singular_task_interference(torch.stack([2 * one, 5 * one])) == pytest.approx(7)
