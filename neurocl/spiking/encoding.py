"""From images to input over time: direct ("static") coding, Poisson and latency coding, and event frames.

Letters: T time steps, B batch. Results are [T, B, C, H, W].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

EncoderName = Literal["static", "poisson", "latency"]


class Encoder(nn.Module):
    """Turn a batch of items into a sequence.

    ``static`` repeats the image as a broadcast view (no copy). ``poisson`` fires at each step with
    probability |x| clipped to 1, carrying the sign of x. ``latency`` fires once, the earlier the larger |x|.
    Event frames [B, T, C, H, W] are transposed. In evaluation mode Poisson coding draws from a fixed
    seed, so evaluation is repeatable and leaves the global generator alone.

    Args:
        timesteps: T.
        name: the coding of images.
    """

    def __init__(self, timesteps: int, name: EncoderName = "static") -> None:
        super().__init__()
        self.timesteps = timesteps
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or frames [B, T, C, H, W] -> [T, B, C, H, W]."""
        if x.ndim == 5:
            return x.transpose(0, 1)
        if self.name == "static":
            return x.expand(self.timesteps, *x.shape)
        magnitude = x.abs().clamp(max=1.0)
        if self.name == "poisson":
            generator = None if self.training else torch.Generator(x.device).manual_seed(0)
            uniform = torch.rand((self.timesteps, *x.shape), device=x.device, generator=generator)
            return (uniform < magnitude) * x.sign()
        # (1 - |x|) (T - 1), rounded down, is the step of the only spike; zero input never fires.
        when = ((1.0 - magnitude) * (self.timesteps - 1)).floor()
        steps = torch.arange(self.timesteps, device=x.device).view(-1, *([1] * x.ndim))
        return ((when == steps) & (magnitude > 0)) * x.sign()


def is_static(x_seq: Tensor) -> bool:
    """Whether a sequence repeats one frame as a broadcast view."""
    return x_seq.shape[0] > 1 and x_seq.stride(0) == 0


def resample(x_seq: Tensor, steps: int) -> Tensor:
    """The first ``steps`` steps of the sequence, which is repeated from its start where it is too short.

    ``resample(x, T // 2)`` and ``resample(x, 2 * T)`` are the inputs of STAER's short and long storage
    passes. A static sequence stays a view.
    """
    if is_static(x_seq):
        return x_seq[:1].expand(steps, *x_seq.shape[1:])
    if steps <= x_seq.shape[0]:
        return x_seq[:steps]
    repeats = -(-steps // x_seq.shape[0])
    return torch.cat([x_seq] * repeats)[:steps]
