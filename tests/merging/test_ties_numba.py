"""The compiled kernels of TIES give the bits of the tensor code."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from neurocl.merging import magnitudes
from neurocl.merging.ties import TiesMeasurement, ties
from tests.merging.pieces import merged_in_pieces, random_models


@pytest.mark.parametrize(
    ("dtype", "sign", "combine"),
    list(product([torch.float64, torch.float32], ["total", "frequency"], ["mean", "sum", "max"])),
)
def test_kernels_and_tensor_code_agree_to_the_last_bit(
    dtype: torch.dtype, sign: str, combine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = random_models(3, 5003)
    base, models = base.to(dtype), models.to(dtype)
    models[1, :500] = 2 * base[:500] - models[0, :500]  # draws in the vote
    models[2, :500] = base[:500]
    weights = torch.tensor([1.0, 1.0, 0.7], dtype=dtype)
    options = {"density": 0.4, "sign": sign, "combine": combine}
    monkeypatch.setattr(magnitudes, "COMPILED_ENTRIES", 0)
    compiled = ties(base, models, weights=weights, **options)  # type: ignore[arg-type]
    pieces = merged_in_pieces(ties, base, models, [1, 64, 1089, 4000], weights=weights, **options)
    monkeypatch.setattr(magnitudes, "COMPILED_ENTRIES", 1 << 60)
    plain = ties(base, models, weights=weights, **options)  # type: ignore[arg-type]
    assert torch.equal(compiled, plain)
    assert torch.equal(pieces, plain)


def test_kernels_count_and_select_like_tensor_code(monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = random_models(2, 7777)
    models[0, ::7] = base[::7] + 1e-50  # not zero, though it rounds to zero in float32
    models[1, ::3] = 1e60  # infinite in float32
    for entries in (0, 1 << 60):
        monkeypatch.setattr(magnitudes, "COMPILED_ENTRIES", entries)
        found = magnitudes.Magnitudes(2, lambda _: [1, 100, 1200, 4000, 7000, 7777])
        while True:
            found.update(base, models)
            if not found.another_pass():
                break
        expected = (models - base).abs().sort(dim=1).values[:, [0, 99, 1199, 3999, 6999, 7776]]
        assert torch.equal(found.values, expected)


def test_kernels_take_models_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = random_models(3, 4000)
    expected = ties(base, models)
    monkeypatch.setattr(magnitudes, "COMPILED_ENTRIES", 0)
    assert torch.equal(ties(base, models.T.contiguous().T), expected)
    assert torch.equal(ties(base.view(40, 100), models.view(3, 40, 100)), expected.view(40, 100))


def test_large_tensors_on_the_cpu_use_the_kernels() -> None:
    large = torch.zeros(1 << 15)
    assert magnitudes.compiled(large, large[None]) is not None
    assert magnitudes.compiled(large[:100], large[None, :100]) is None
    assert magnitudes.compiled(large.bfloat16(), large[None].bfloat16()) is None
    assert magnitudes.compiled(large, large[None].requires_grad_()) is None


def test_thresholds_do_not_depend_on_the_size_of_the_pieces() -> None:
    base, models = random_models(2, 100_000)
    whole, pieces = TiesMeasurement(2), TiesMeasurement(2)
    for measurement, size in ((whole, 100_000), (pieces, 1000)):
        while True:
            for start in range(0, 100_000, size):
                measurement.update(base[start : start + size], models[:, start : start + size])
            if not measurement.another_pass():
                break
    assert torch.equal(whole.thresholds, pieces.thresholds)
    assert whole.majority == pieces.majority
