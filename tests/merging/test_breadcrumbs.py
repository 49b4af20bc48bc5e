"""Task arithmetic with task vectors thinned by magnitude."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurocl.merging.arithmetic import task_arithmetic
from neurocl.merging.breadcrumbs import breadcrumb_ranks, breadcrumbs, magnitude_prune
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models

NAMES = ("a.weight", "a.bias", "b.weight", "ln.weight")


def stored_vectors(name: str) -> tuple[dict[str, Tensor], Tensor]:
    stored = {key: torch.from_numpy(value) for key, value in reference("merging-baselines/sparsify_per_tensor").items()}
    return stored, torch.stack([stored[f"tv{task}/{name}"] for task in range(3)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.01), (0.8, 0.05)])
def test_reference_breadcrumbs_are_reproduced(name: str, density: float, gamma: float) -> None:
    stored, vectors = stored_vectors(name)
    for vector, expected in zip(vectors, stored[f"x/breadcrumbs_d{density}_g{gamma}/{name}"], strict=True):
        merged = breadcrumbs(torch.zeros_like(vector), vector[None], density=density, gamma=gamma)
        assert torch.equal(merged, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("key", "density", "rescale"),
    [
        ("magnitude_d0.2", 0.2, "none"),
        ("magnitude_d0.5_l1", 0.5, "l1"),
        ("magnitude_d0.5_l2", 0.5, "l2"),
        ("magnitude_d0.5_linf", 0.5, "linf"),
    ],
)
def test_reference_pruning_is_reproduced(name: str, key: str, density: float, rescale: str) -> None:
    stored, vectors = stored_vectors(name)
    for vector, expected in zip(vectors, stored[f"x/{key}/{name}"], strict=True):
        merged = magnitude_prune(torch.zeros_like(vector), vector[None], density=density, rescale=rescale)  # type: ignore[arg-type]
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rescale", "order"), [("l1", 1), ("l2", 2), ("linf", float("inf"))])
def test_rescaled_pruning_keeps_the_norm(rescale: str, order: float) -> None:
    _, models = random_models(1, 1000)
    zero = torch.zeros(1000, dtype=torch.float64)
    merged = magnitude_prune(zero, models, density=0.3, rescale=rescale)  # type: ignore[arg-type]
    assert merged.count_nonzero() == 300
    assert merged.norm(p=order).item() == pytest.approx(models[0].norm(p=order).item(), rel=1e-13)


def test_keeping_everything_is_task_arithmetic() -> None:
    base, models = random_models(3, 200)
    weights = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    expected = task_arithmetic(base, models, weights=weights)
    for merged in (
        breadcrumbs(base, models, weights=weights, density=1.0, gamma=0.0),
        magnitude_prune(base, models, weights=weights, density=1.0, rescale="l2"),
    ):
        torch.testing.assert_close(merged, expected, rtol=1e-15, atol=1e-15)


def test_breadcrumbs_keep_the_middle_of_the_magnitudes() -> None:
    models = torch.arange(1.0, 11.0)[None]
    merged = breadcrumbs(torch.zeros(10), models, density=0.5, gamma=0.2)
    assert merged.tolist() == [0, 0, 0, 4, 5, 6, 7, 8, 0, 0]


def test_ranks_count_from_the_smallest() -> None:
    assert breadcrumb_ranks(80, 0.5, 0.1) == (33, 72)
    assert breadcrumb_ranks(10, 0.9, 0.5) == (1, 9)
    assert breadcrumb_ranks(3, 0.2, 0.0) == (4, 4)


@pytest.mark.parametrize("function", [breadcrumbs, magnitude_prune])
def test_a_density_that_keeps_less_than_one_entry_gives_the_base(function: object) -> None:
    base, models = random_models(2, 3)
    assert torch.equal(function(base, models, density=0.1), base)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (breadcrumbs, {"density": 0.6, "gamma": 0.05}),
        (magnitude_prune, {"rescale": "none"}),
        (magnitude_prune, {"rescale": "l1"}),
        (magnitude_prune, {"rescale": "l2"}),
    ],
)
def test_pieces_give_the_bits_of_the_whole(function: object, options: dict[str, object]) -> None:
    base, models = random_models(3, 10_007)
    weights = torch.tensor([0.2, 0.3, 0.9], dtype=torch.float64)
    whole = function(base, models, weights=weights, **options)  # type: ignore[operator]
    pieces = merged_in_pieces(function, base, models, [1, 5, 4096, 4097, 9000], weights=weights, **options)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("function", [breadcrumbs, magnitude_prune])
def test_models_equal_to_the_base_and_empty_tensors_pass(function: object) -> None:
    base, _ = random_models(1, 40)
    assert torch.equal(function(base, base.expand(3, -1)), base)  # type: ignore[operator]
    assert function(torch.empty(0), torch.empty(2, 0)).shape == (0,)  # type: ignore[operator]
