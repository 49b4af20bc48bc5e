"""Exact order statistics of magnitudes over pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neurocl.merging import magnitudes
from neurocl.merging.magnitudes import Magnitudes


def selected(base: Tensor, models: Tensor, ranks: Sequence[int], cuts: Sequence[int] = ()) -> Tensor:
    found = Magnitudes(len(models), lambda _: ranks)
    borders = [0, *cuts, base.numel()]
    while True:
        for start, stop in pairwise(borders):
            found.update(base[start:stop], models[:, start:stop])
        if not found.another_pass():
            return found.values


def sorted_out(base: Tensor, models: Tensor, ranks: Sequence[int]) -> Tensor:
    ascending = (models - base).abs().double().sort(dim=1).values
    return ascending[:, [rank - 1 for rank in ranks]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ranks_are_those_of_a_full_sort(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype)
    models = (base + torch.randn(3, 5000, generator=generator, dtype=torch.float64) * 0.01).to(dtype)
    ranks = [1, 2, 1000, 4001, 4999, 5000]
    assert torch.equal(selected(base, models, ranks), sorted_out(base, models, ranks))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=40),
    cut=st.integers(0, 40),
)
def test_any_finite_values_are_selected_exactly(values: list[float], cut: int) -> None:
    models = torch.tensor([values], dtype=torch.float64)
    ranks = range(1, len(values) + 1)
    base = torch.zeros(len(values), dtype=torch.float64)
    assert torch.equal(selected(base, models, ranks, [min(cut, len(values))]), sorted_out(base, models, ranks))


def test_values_that_only_float64_tells_apart_are_selected_exactly() -> None:
    models = 1 + torch.arange(100, dtype=torch.float64).flip(0)[None] * 2**-50
    base = torch.zeros(100, dtype=torch.float64)
    assert torch.equal(selected(base, models, [30, 77]), sorted_out(base, models, [30, 77]))


def test_ranks_outside_stand_for_zero_and_infinity() -> None:
    base, models = torch.zeros(3), torch.tensor([[1.0, 2.0, 3.0]])
    assert selected(base, models, [0, 4]).tolist() == [[0.0, math.inf]]


def test_a_rank_among_the_zeros_needs_no_second_pass() -> None:
    found = Magnitudes(1, lambda num_entries: [num_entries // 2])
    found.update(torch.zeros(10), torch.tensor([[0.0] * 6 + [1.0] * 4]))
    assert not found.another_pass()
    assert found.values.item() == 0


def test_nothing_at_all_has_no_ranks_but_no_crash() -> None:
    assert selected(torch.empty(0), torch.empty(2, 0), [0, 1]).tolist() == [[0.0, math.inf]] * 2


def test_values_that_repeat_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitudes, "COMPACT_AT", 50)
    generator = torch.Generator().manual_seed(2)
    base = torch.zeros(3000, dtype=torch.float64)
    models = torch.randint(1000, 1004, (2, 3000), generator=generator).double() / 1000
    ranks = [1, 700, 1500, 3000]
    assert torch.equal(selected(base, models, ranks, range(40, 3000, 40)), sorted_out(base, models, ranks))


def test_values_that_do_not_repeat_survive_being_sorted_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magnitudes, "COMPACT_AT", 50)
    generator = torch.Generator().manual_seed(3)
    models = 1 + torch.rand(1, 3000, generator=generator, dtype=torch.float64) / 1000
    base = torch.zeros(3000, dtype=torch.float64)
    ranks = [1, 700, 1500, 3000]
    assert torch.equal(selected(base, models, ranks, range(40, 3000, 40)), sorted_out(base, models, ranks))
