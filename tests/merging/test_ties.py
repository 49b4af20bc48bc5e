"""TIES: against published results, against itself written plainly, and its identities."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from neurocl.merging.ties import TiesMeasurement, ties, trim_rank
from tests.conftest import reference
from tests.merging.pieces import merged_in_pieces, random_models

Array = NDArray[np.float64]


def plain_ties(
    base: Tensor,
    models: Tensor,
    density: float,
    *,
    count: str = "published",
    sign: str = "total",
    combine: str = "mean",
) -> Tensor:
    """TIES with a sort, written from the paper."""
    vectors: Array = (models - base).numpy()
    num_entries = vectors.shape[1]
    rank = num_entries - int(density * num_entries) + (count == "exact")
    ascending = np.sort(np.abs(vectors), axis=1)
    bounded = np.pad(ascending, [(0, 0), (1, 1)], constant_values=(0, np.inf))
    threshold = bounded[:, max(rank, 0)]
    trimmed = np.where(np.abs(vectors) >= threshold[:, None], vectors, 0)
    votes = np.zeros(num_entries)
    for row in trimmed:
        votes = votes + (np.sign(row) if sign == "frequency" else row)
    elected = np.sign(votes)
    elected[elected == 0] = np.sign(elected.sum())
    agreeing = np.where(np.sign(trimmed) == elected, trimmed, 0)
    total, number = np.zeros(num_entries), np.zeros(num_entries)
    for row in agreeing:
        total, number = total + row, number + (row != 0)
    if combine == "mean":
        total = total / np.maximum(number, 1)
    elif combine == "max":
        total = np.abs(agreeing).max(axis=0) * elected
    return base + torch.from_numpy(total)


@pytest.mark.parametrize(("percent", "combine"), list(product([10, 20, 50, 100], ["mean", "sum", "max"])))
def test_the_published_results_are_reproduced(percent: int, combine: str) -> None:
    stored = reference("merging-baselines/ties")
    vectors = torch.from_numpy(stored["tv"])
    merged = ties(torch.zeros(vectors.shape[1]), vectors, density=percent / 100, combine=combine)  # type: ignore[arg-type]
    expected = torch.from_numpy(stored[f"ties_K{percent}_dis-{combine}"])
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("percent", [10, 20, 50, 100])
def test_the_published_trimmed_vectors_are_reproduced(percent: int) -> None:
    stored = reference("merging-baselines/ties")
    for vector, expected in zip(stored["tv"], stored[f"topk_K{percent}"], strict=True):
        alone = torch.from_numpy(vector)[None]
        merged = ties(torch.zeros(alone.shape[1]), alone, density=percent / 100)
        assert torch.equal(merged, torch.from_numpy(expected))


@pytest.mark.parametrize(("combine", "variant"), [("sum", "ties_sum"), ("mean", "ties_norm")])
def test_weighted_ties_with_exact_counts_is_reproduced(combine: str, variant: str) -> None:
    stored = reference("merging-baselines/gta_ties_per_tensor")
    weights = torch.from_numpy(stored["x/weights"])
    for name in ("a.weight", "a.bias", "b.weight", "ln.weight"):
        base = torch.from_numpy(stored[f"base/{name}"]).double()
        vectors = torch.stack([torch.from_numpy(stored[f"tv{task}/{name}"]).double() for task in range(3)])
        # the task vectors are given; going through base + vector would round them
        merged = base + ties(
            torch.zeros_like(base), vectors, weights=weights, density=0.3, count="exact", trim="tensor", combine=combine
        )  # type: ignore[arg-type]
        torch.testing.assert_close(merged, torch.from_numpy(stored[f"x/{variant}/{name}"]), rtol=1e-10, atol=0)


def test_published_ties_per_tensor_is_reproduced() -> None:
    stored = reference("merging-tak-kfac/tak_merging")
    seen = 0
    for key in stored:
        name = key.removeprefix("out_ties_alpha3/")
        if name == key or stored[key].ndim != 2:
            continue
        vectors = torch.stack([torch.from_numpy(stored[f"in/tv{task}/{name}"]).double() for task in range(3)])
        merged = ties(torch.zeros_like(vectors[0]), vectors, trim="tensor")
        torch.testing.assert_close(merged, torch.from_numpy(stored[key]), rtol=0, atol=1e-9)
        seen += 1
    assert seen == 6


@pytest.mark.parametrize(
    ("density", "count", "sign", "combine"),
    list(product([1e-9, 0.2, 0.37, 1.0], ["published", "exact"], ["total", "frequency"], ["mean", "sum", "max"])),
)
def test_it_equals_ties_with_a_sort_bit_for_bit(density: float, count: str, sign: str, combine: str) -> None:
    base, models = random_models(4, 2011)
    # coarse values make ties at the threshold, draws in the vote and zeros
    base, models = (base * 64).round() / 64, (models * 64).round() / 64
    options = {"density": density, "count": count, "sign": sign, "combine": combine}
    assert torch.equal(ties(base, models, **options), plain_ties(base, models, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_pieces_give_the_bits_of_the_whole(sign: str) -> None:
    base, models = random_models(4, 1003)
    weights = torch.tensor([0.5, 1.0, 0.25, 1.5], dtype=torch.float64)
    whole = ties(base, models, weights=weights, sign=sign)  # type: ignore[arg-type]
    pieces = merged_in_pieces(ties, base, models, [1, 2, 3, 77, 600, 600, 1002], weights=weights, sign=sign)
    assert torch.equal(pieces, whole)


def test_model_wide_trimming_equals_ties_on_the_flattened_model() -> None:
    base, models = random_models(3, 700)
    flattened = ties(base, models)
    measured = TiesMeasurement(3)
    tensors = [(base[:64].view(8, 8), models[:, :64].view(3, 8, 8)), (base[64:], models[:, 64:])]
    while True:
        for part, stacked in tensors:
            measured.update(part.reshape(-1), stacked.reshape(3, -1))
        if not measured.another_pass():
            break
    merged = torch.cat([ties(part, stacked, measured=measured).reshape(-1) for part, stacked in tensors])
    assert torch.equal(merged, flattened)


def test_one_expert_untrimmed_is_returned() -> None:
    base, models = random_models(1, 500)
    base, models = base.bfloat16().double(), models.bfloat16().double()
    assert torch.equal(ties(base, models, density=1.0), models[0])


def test_identical_experts_give_the_trimmed_expert() -> None:
    base, models = random_models(1, 500)
    assert torch.equal(ties(base, models.expand(4, -1)), ties(base, models))


def test_the_order_of_the_models_does_not_matter() -> None:
    base, models = random_models(4, 500)
    torch.testing.assert_close(ties(base, models), ties(base, models[[2, 0, 3, 1]]), rtol=1e-14, atol=1e-15)


def test_a_common_factor_on_the_task_vectors_comes_out() -> None:
    _, models = random_models(4, 500)
    zero = torch.zeros(500, dtype=torch.float64)
    assert torch.equal(ties(zero, models * 4), ties(zero, models) * 4)


def test_no_entry_is_invented() -> None:
    base, models = random_models(3, 500)
    assert not (ties(base, models, density=1.0) != base)[(models == base).all(dim=0)].any()


def test_a_drawn_vote_follows_the_sign_that_prevails() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    models = torch.tensor([[1.0, -2.0, -3.0, 5.0], [-1.0, -2.0, -3.0, 0.0]], dtype=torch.float64)
    assert ties(zero, models, density=1.0).tolist() == [-1.0, -2.0, -3.0, 5.0]
    assert ties(zero, -models, density=1.0).tolist() == [1.0, 2.0, 3.0, -5.0]


def test_a_draw_over_the_whole_vector_keeps_the_base() -> None:
    zero = torch.zeros(1)
    assert ties(zero, torch.tensor([[1.0], [-1.0]]), density=1.0).tolist() == [0.0]


def test_the_published_count_keeps_one_entry_more_than_the_exact_one() -> None:
    assert trim_rank(503, 0.2) == 403
    assert trim_rank(503, 0.2, "exact") == 404
    base, models = torch.zeros(1000, dtype=torch.float64), torch.randn(1, 1000, dtype=torch.float64)
    assert int(ties(base, models).count_nonzero()) == 201
    assert int(ties(base, models, count="exact").count_nonzero()) == 200


def test_a_density_that_keeps_less_than_one_entry_keeps_the_largest_or_nothing() -> None:
    base, models = torch.zeros(4), torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    assert ties(base, models, density=0.1).tolist() == [0.0, -3.0, 0.0, 0.0]
    assert torch.equal(ties(base, models, density=0.1, count="exact"), base)


def test_models_equal_to_the_base_give_the_base() -> None:
    base, _ = random_models(1, 40)
    assert torch.equal(ties(base, base.expand(3, -1)), base)


def test_a_model_of_weight_zero_has_no_vote() -> None:
    base, models = random_models(3, 300)
    weights = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(ties(base, models, weights=weights), ties(base, models[[0, 2]]))


@pytest.mark.parametrize("shape", [(0,), (1,), ()])
def test_tiny_tensors_pass(shape: tuple[int, ...]) -> None:
    base, models = torch.zeros(shape), torch.ones(3, *shape)
    assert torch.equal(ties(base, models), torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_work_is_done_in_the_given_type(dtype: torch.dtype) -> None:
    base, models = random_models(2, 40)
    assert ties(base.to(dtype), models.to(dtype)).dtype == dtype
