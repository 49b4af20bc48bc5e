"""Rounding results to the type of the output once: to the nearest value, halves to the even one."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FEW = 64
LOWER_HALF = 0 if sys.byteorder == "little" else 1


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` [n] in ``dtype``, every entry the nearest one to it.

    torch takes float64 to 16 bits by way of float32. Where that first step lands halfway between two results, the
    second cannot know on which side the value was, and about one entry in 100,000 comes out one unit off.
    """
    if values.dtype != torch.float64 or dtype.itemsize > 2 or not dtype.is_floating_point:
        return values.to(dtype)
    if dtype != torch.bfloat16:
        return _to_odd(values).to(dtype)
    single = values.float()
    # bfloat16 is the upper half of float32, so halfway is a lower half of 0x8000
    halfway = single.view(torch.int16)[LOWER_HALF::2] == -(1 << 15)
    # where float32 holds the value itself, as in means of few models, all is well; such halves are many or hardly any
    if int(halfway.count_nonzero()) * FEW > len(values):
        halfway &= single.double() != values
    places = halfway.nonzero().squeeze(1)
    if len(places):
        single[places] = _to_odd(values[places])
    return single.to(dtype)


def _to_odd(values: Tensor) -> Tensor:
    """float64 to float32 such that rounding again is right: what does not fit gets an odd last bit, never a half."""
    single = values.float()
    bits = single.view(torch.int32)
    difference = single.double().abs_() - values.abs()
    bits -= (difference > 0).int()
    bits |= (difference != 0).int()
    return single
