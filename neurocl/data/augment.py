"""Training-time augmentation of whole batches: random crop, flip and colour jitter in tensor operations.

Letters: B samples, T time frames, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from neurocl.data.catalog import AugmentMode
from neurocl.errors import UserError
from neurocl.registry import did_you_mean

PADDING = 4
_BRIGHTNESS = _CONTRAST = _SATURATION = 0.2
_HUE = 0.1
_GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)


class Augment:
    """From raw pictures to network input.

    ``"none"`` scales and normalises only. ``"crop-flip"`` pads by 4 pixels of zeros, cuts a window of the old
    size at a random place and mirrors every second sample. ``"strong"`` adds brightness, contrast and
    saturation factors within 0.2 of 1 and hue shifts of up to 0.1 of a turn, in this order. Numbers are
    drawn per sample, the same for all its time frames.

    Args:
        mean, std: per channel, of pixels in 0..1; both None for no normalisation.
    Raises:
        UserError: unknown mode, only one of mean and std, a std that is not positive.
    """

    def __init__(
        self, mode: AugmentMode, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        modes = get_args(AugmentMode)
        if mode not in modes:
            raise UserError(
                f"unknown augmentation {mode!r}{did_you_mean(str(mode), modes)} (choose from {', '.join(modes)})"
            )
        if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
            raise UserError(f"mean and std go together, one number a channel, got {mean} and {std}")
        if std is not None and min(std) <= 0:
            raise UserError(f"std must be positive, got {tuple(std)}")
        self.mode = mode
        self._mean, self._std = mean, std
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Augment and normalise a batch.

        Args:
            raw: [B, C, H, W] or [B, T, C, H, W], uint8, or floating point in 0..1.
            generator: a CPU generator, so that the result does not depend on the device of ``raw``. The
                numbers drawn depend on B and the mode only.
        Returns: float32 of the shape of ``raw``, on its device.
        Raises:
            ValueError: another number of dimensions, or colour jitter on neither 1 nor 3 channels.
        """
        if self.mode == "none":
            return self.normalise(raw)
        shift = torch.randint(0, 2 * PADDING + 1, (raw.shape[0], 2), generator=generator)
        flip = torch.randint(0, 2, (raw.shape[0],), generator=generator, dtype=torch.bool)
        # on the raw bytes, a quarter of the memory traffic of floats
        pictures = _unit_range(crop_flip(raw, shift, flip))
        if self.mode == "strong":
            draws = torch.rand(raw.shape[0], 4, generator=generator) * 2 - 1
            pictures = colour_jitter(pictures, draws)
        return self._normalised(pictures)

    def normalise(self, raw: Tensor) -> Tensor:
        """Scale to 0..1 and normalise, without chance: for evaluation. Same shapes as ``__call__``."""
        _check_dimensions(raw)
        return self._normalised(_unit_range(raw))

    def _normalised(self, pictures: Tensor) -> Tensor:
        if self._mean is None or self._std is None:
            return pictures
        if len(self._mean) != pictures.shape[-3]:
            raise ValueError(f"mean has {len(self._mean)} channels, the pictures have {pictures.shape[-3]}")
        if pictures.device not in self._constants:
            self._constants[pictures.device] = (
                torch.tensor(self._mean, device=pictures.device)[:, None, None],
                torch.tensor(self._std, device=pictures.device)[:, None, None],
            )
        mean, std = self._constants[pictures.device]
        return (pictures - mean) / std


def crop_flip(raw: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Cut one window out of each zero-padded sample, then mirror some of them left to right.

    Args:
        raw: [B, C, H, W] or [B, T, C, H, W], any dtype.
        shift: upper left corner of each window in the padded picture (row, column), int64 [B, 2] in
            0 .. 2 * PADDING; (PADDING, PADDING) leaves the picture as it is.
        flip: bool [B].
    Returns: the shape and dtype of ``raw``.
    """
    _check_dimensions(raw)
    flat_BCHW = raw.flatten(1, -3)
    B, channels, H, W = flat_BCHW.shape
    padded = functional.pad(flat_BCHW, (PADDING,) * 4)
    shift, flip = shift.to(raw.device), flip.to(raw.device)
    rows_BH = shift[:, :1] + torch.arange(H, device=raw.device)
    straight_W = torch.arange(W, device=raw.device)
    columns_BW = shift[:, 1:] + torch.where(flip[:, None], W - 1 - straight_W, straight_W)
    cut = padded.gather(2, rows_BH[:, None, :, None].expand(B, channels, H, W + 2 * PADDING))
    cut = cut.gather(3, columns_BW[:, None, None, :].expand(B, channels, H, W))
    return cut.view(raw.shape)


def colour_jitter(pictures: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each sample, in this order.

    Grey pictures have neither saturation nor hue, only the first two are applied.

    Args:
        pictures: floating point in 0..1, [B, C, H, W] or [B, T, C, H, W] with 1 or 3 channels.
        draws: [B, 4] in -1..1, the strength of each change.
    Returns: pictures in 0..1, same shape.
    Raises:
        ValueError: a number of channels that is neither 1 nor 3.
    """
    channels = pictures.shape[-3]
    if channels not in (1, 3):
        raise ValueError(f"colour jitter needs 1 or 3 channels, got {channels}")
    draws = draws.to(pictures.device, pictures.dtype)
    brightness, contrast, saturation, hue = (
        draws[:, index].view(-1, *[1] * (pictures.dim() - 1)) for index in range(4)
    )
    pictures = (pictures * (1 + _BRIGHTNESS * brightness)).clamp(0, 1)
    middle = _grey(pictures).mean(dim=(-3, -2, -1), keepdim=True)
    pictures = (middle + (pictures - middle) * (1 + _CONTRAST * contrast)).clamp(0, 1)
    if channels == 1:
        return pictures
    grey = _grey(pictures)
    pictures = (grey + (pictures - grey) * (1 + _SATURATION * saturation)).clamp(0, 1)
    return turn_hue(pictures, (_HUE * hue).squeeze(-3))


def turn_hue(pictures: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB pictures by a part of the colour circle, in the hexcone (HSV) model.

    With value v, chroma c and hue h in sixths of a turn, channel n of (5, 3, 1) is
    ``v - c * clamp(min(k, 4 - k), 0, 1)`` where ``k = (n + h) mod 6``.

    Args:
        pictures: [..., 3, H, W] in 0..1.
        turn: 1 is a whole turn, broadcastable to [..., H, W].
    Reference: Smith, "Color gamut transform pairs", SIGGRAPH 1978.
    """
    red, green, blue = pictures.unbind(-3)
    value = pictures.amax(-3)
    chroma = value - pictures.amin(-3)
    safe = chroma.where(chroma > 0, torch.ones_like(chroma))
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = hue + 6 * turn
    channels = []
    for offset in (5, 3, 1):
        k = (hue + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=-3)


def _check_dimensions(raw: Tensor) -> None:
    if raw.dim() not in (4, 5):
        raise ValueError(f"a batch has shape [B, C, H, W] or [B, T, C, H, W], got {list(raw.shape)}")


def _unit_range(raw: Tensor) -> Tensor:
    return raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()


def _grey(pictures: Tensor) -> Tensor:
    if pictures.shape[-3] == 1:
        return pictures
    weights = torch.tensor(_GREY_WEIGHTS, device=pictures.device, dtype=pictures.dtype)
    return (pictures * weights[:, None, None]).sum(-3, keepdim=True)
