"""WUDI against reference results: the published Adam iteration and the minimum of its objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neurocl.merging.wudi import wudi
from tests.conftest import reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def objective(merged: Tensor, tasks: Tensor) -> float:
    return sum(float(((merged - task) @ task.mT).square().sum() / task.square().sum()) for task in tasks)


def delta(tasks: Tensor, **options: Any) -> Tensor:
    base = random(*tasks.shape[1:], seed=99)
    return wudi(base, base + tasks, **options) - base


@pytest.fixture(params=["a.weight", "b.weight"])
def case(request: pytest.FixtureRequest) -> tuple[Tensor, dict[str, np.ndarray]]:
    data = reference("merging-baselines/wudi")
    tasks = torch.stack([torch.from_numpy(data[f"tv{task}/{request.param}"]) for task in range(3)])
    return tasks, {key: data[f"x/{key}/{request.param}"] for key in ("adam50", "closed", "obj_sum", "obj_closed")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fifty_steps_of_adam_end_where_the_reference_does(case: Any, dtype: torch.dtype) -> None:
    tasks, expected = case
    merged = wudi(torch.zeros_like(tasks[0]).to(dtype), tasks.to(dtype), num_steps=50).numpy()
    assert np.linalg.norm(merged - expected["adam50"]) <= 1e-6 * np.linalg.norm(expected["adam50"])


def test_the_closed_form_is_the_reference_minimum(case: Any) -> None:
    tasks, expected = case[0].double(), case[1]
    merged = wudi(torch.zeros_like(tasks[0]), tasks, solver="closed")
    np.testing.assert_allclose(
        merged.numpy(), expected["closed"], rtol=1e-10, atol=1e-10 * np.abs(expected["closed"]).max()
    )
    assert objective(merged, tasks) == pytest.approx(float(expected["obj_closed"]), rel=1e-10)
    assert objective(tasks.sum(dim=0), tasks) == pytest.approx(float(expected["obj_sum"]), rel=1e-6)


def test_adam_lowers_the_objective_and_stays_above_the_minimum() -> None:
    tasks = 0.01 * random(3, 8, 6)
    start, steps, minimum = (
        objective(delta(tasks, **options), tasks)
        for options in ({"num_steps": 0}, {"num_steps": 300}, {"solver": "closed"})
    )
    assert minimum < steps < start


def test_no_direction_leads_below_the_closed_form() -> None:
    tasks = random(3, 7, 9)
    merged = delta(tasks, solver="closed")
    for seed in range(5):
        assert objective(merged + 1e-3 * random(7, 9, seed=seed), tasks) > objective(merged, tasks)


@pytest.mark.parametrize("solver", ["adam", "closed"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 3)])
def test_merging_one_model_returns_it(solver: Any, shape: tuple[int, int]) -> None:
    task = random(*shape)
    torch.testing.assert_close(delta(task.unsqueeze(0), solver=solver), task, rtol=1e-12, atol=1e-12)


def test_the_closed_form_of_identical_experts_is_the_expert() -> None:
    task = random(4, 7)
    torch.testing.assert_close(delta(torch.stack([task] * 3), solver="closed"), task, rtol=1e-12, atol=1e-12)


def test_experts_with_different_inputs_each_keep_their_columns() -> None:
    first, second = random(5, 6), random(5, 6, seed=1)
    first[:, 3:], second[:, :3] = 0, 0
    torch.testing.assert_close(delta(torch.stack([first, second]), solver="closed"), first + second)


def test_the_closed_form_ignores_the_order_and_the_common_scale_of_the_tasks() -> None:
    tasks = random(3, 6, 5)
    merged = delta(tasks, solver="closed")
    torch.testing.assert_close(delta(tasks[[2, 0, 1]], solver="closed"), merged)
    torch.testing.assert_close(delta(1e-2 * tasks, solver="closed"), 1e-2 * merged)


def test_a_strong_ridge_gives_the_mean() -> None:
    tasks = random(3, 6, 5)
    torch.testing.assert_close(delta(tasks, solver="closed", ridge=1e12), tasks.mean(dim=0))


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_a_model_of_weight_zero_is_as_good_as_absent(solver: Any) -> None:
    tasks = random(3, 6, 5)
    weights = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(delta(tasks, solver=solver, weights=weights), delta(tasks[[0, 2]], solver=solver))


@pytest.mark.parametrize("solver", ["adam", "closed"])
def test_tasks_that_change_nothing_give_the_base_or_do_not_count(solver: Any) -> None:
    base = random(4, 3)
    assert torch.equal(wudi(base, base.expand(2, 4, 3), solver=solver), base)
    assert wudi(base[:0], base[:0].expand(2, 0, 3), solver=solver).shape == (0, 3)
    task = random(4, 3, seed=1)
    merged = delta(torch.stack([task, torch.zeros_like(task)]), solver=solver)
    torch.testing.assert_close(merged, task, rtol=1e-9, atol=1e-9)
