"""Sums that do not depend on how a tensor was cut."""

from __future__ import annotations

import math

import pytest
import torch

from neurocl.merging.sums import StreamProducts, StreamSum


def total(values: torch.Tensor, cuts: list[int]) -> float:
    found = StreamSum()
    for part in values.tensor_split(cuts):
        found.add(part)
    return found.total()


@pytest.mark.parametrize("cuts", [[1], [4095], [4096], [4097, 4098], [100, 9000, 9001], list(range(0, 20000, 777))])
def test_the_bits_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    values = torch.randn(20001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert total(values, cuts) == total(values, [])


def test_the_sum_is_right_to_float64() -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert total(values, []) == pytest.approx(math.fsum(values.tolist()), abs=1e-11)


def test_float32_values_are_added_in_float64() -> None:
    assert total(torch.tensor([1e8, 1.0, -1e8], dtype=torch.float32), []) == 1.0


def test_nothing_adds_up_to_zero() -> None:
    assert StreamSum().total() == 0.0


def test_later_changes_of_a_reused_buffer_do_not_reach_the_sum() -> None:
    found, buffer = StreamSum(), torch.ones(10, dtype=torch.float64)
    found.add(buffer)
    buffer.zero_()
    assert found.total() == 10


def products(vectors: torch.Tensor, cuts: list[int]) -> dict[tuple[int, int], float]:
    found = StreamProducts(len(vectors))
    for part in vectors.tensor_split(cuts, dim=1):
        found.add(part)
    return found.totals()


@pytest.mark.parametrize("cuts", [[1], [4095], [4096], [4097, 4098], [100, 9000, 9001], list(range(0, 20000, 777))])
def test_the_bits_of_products_do_not_depend_on_the_cuts(cuts: list[int]) -> None:
    vectors = torch.randn(3, 20001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert products(vectors, cuts) == products(vectors, [])


def test_products_are_right_to_float64() -> None:
    vectors = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for (first, second), value in products(vectors, [777, 30_000]).items():
        expected = math.fsum((vectors[first] * vectors[second]).tolist())
        assert value == pytest.approx(expected, abs=1e-10)
    assert set(products(vectors, [])) == {(0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)}


def test_products_of_nothing_are_zero() -> None:
    assert StreamProducts(2).totals() == {(0, 0): 0.0, (0, 1): 0.0, (1, 1): 0.0}
