"""Results are rounded to the type of the output once."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from neurocl.merging.rounding import rounded


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of ``dtype``, halves to the even one, found by exact arithmetic among three neighbours."""
    integers = torch.int16 if dtype.itemsize == 2 else torch.int8
    best = []
    for value, guess in zip(values.tolist(), values.abs().to(dtype).view(integers).tolist(), strict=True):
        around = torch.tensor([max(0, guess - 1), guess, guess + 1], dtype=integers).view(dtype).double().tolist()
        distances = [abs(Fraction(near) - Fraction(abs(value))) for near in around]
        order = sorted(range(3), key=lambda i: (distances[i], (guess - 1 + i) % 2))
        best.append(around[order[0]] * (-1 if value < 0 else 1))
    return torch.tensor(best, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_what_float32_would_put_halfway_goes_to_the_right_side(dtype):
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float8_e4m3fn: 4}[dtype]
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(2 ** (bits - 1), 2**bits - 1, (2000,), generator=generator).double()
    halves = (steps + 0.5) * 2.0 ** (torch.randint(-4, 4, (2000,), generator=generator) - bits)
    nudges = torch.randint(-1, 2, (2000,), generator=generator).double() * 2.0**-40
    values = halves * (1 + nudges) * torch.where(torch.rand(2000, generator=generator) < 0.5, 1.0, -1.0)
    expected = nearest(values, dtype)
    assert torch.equal(rounded(values, dtype).double(), expected.double())
    if dtype != torch.float8_e4m3fn:
        assert not torch.equal(values.to(dtype), expected), "torch rounds once by now; the detour can go"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_small_and_special_values_are_rounded_to_the_nearest(dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    tiny = values * float(torch.finfo(dtype).tiny)
    special = torch.tensor([0.0, -0.0, 1.0, float(torch.finfo(dtype).max) / 3], dtype=torch.float64)
    for part in (values, tiny, special):
        assert torch.equal(rounded(part, dtype), nearest(part, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_other_types_are_converted_as_torch_does(dtype):
    values = torch.arange(5, dtype=torch.float64) / (1 if dtype == torch.int64 else 3)
    assert torch.equal(rounded(values, dtype), values.to(dtype))
    assert torch.equal(rounded(values.float(), torch.bfloat16), values.float().bfloat16())
