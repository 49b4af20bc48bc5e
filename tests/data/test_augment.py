"""Augmentation as identities: known draws equal slicing, hue equals the standard library's."""

from __future__ import annotations

import colorsys

import pytest
import torch
from torch import Tensor

from neurocl.data import Augment
from neurocl.data.augment import PADDING, colour_jitter, crop_flip, turn_hue
from neurocl.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(9))


@pytest.mark.parametrize("shape", [(81, 3, 6, 5), (81, 2, 3, 6, 5)])
def test_crop_and_flip_equal_slicing_at_every_shift(shape: tuple[int, ...]) -> None:
    raw = pictures(*shape)
    shift = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    flip = torch.arange(81) % 2 == 1
    padded = torch.nn.functional.pad(raw, (PADDING,) * 4)
    for sample, cut in enumerate(crop_flip(raw, shift, flip)):
        row, column = shift[sample].tolist()
        expected = padded[sample, ..., row : row + 6, column : column + 5]
        assert torch.equal(cut, expected.flip(-1) if flip[sample] else expected)


def test_the_middle_window_is_the_picture_itself() -> None:
    raw = pictures(4, 3, 8, 8)
    middle = torch.full((4, 2), PADDING)
    assert torch.equal(crop_flip(raw, middle, torch.zeros(4, dtype=torch.bool)), raw)


@pytest.mark.parametrize("mode", ["none", "crop-flip", "strong"])
def test_the_same_generator_gives_the_same_result_and_another_does_not(mode: str) -> None:
    raw, augment = pictures(16, 3, 8, 8), Augment(mode, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))  # type: ignore[arg-type]
    first = augment(raw, generator(1))
    assert first.dtype == torch.float32
    assert first.shape == raw.shape
    assert torch.equal(first, augment(raw, generator(1)))
    assert torch.equal(first, augment(raw, generator(2))) == (mode == "none")


def test_a_known_draw_reproduces_the_call() -> None:
    raw = pictures(16, 3, 8, 8)
    draws = generator(3)
    shift = torch.randint(0, 9, (16, 2), generator=draws)
    flip = torch.randint(0, 2, (16,), generator=draws, dtype=torch.bool)
    expected = crop_flip(raw, shift, flip).float() / 255
    assert torch.equal(Augment("crop-flip")(raw, generator(3)), expected)


def test_the_result_is_normalised_after_padding_with_black() -> None:
    white = torch.full((64, 1, 4, 4), 255, dtype=torch.uint8)
    values = Augment("crop-flip", (0.5,), (0.25,))(white, generator()).unique()
    assert values.tolist() == [-2.0, 2.0]


def test_normalise_equals_the_formula_and_none_is_the_same() -> None:
    raw = pictures(5, 3, 8, 8)
    augment = Augment("none", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615))
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    std = torch.tensor([0.2470, 0.2435, 0.2615])[:, None, None]
    expected = (raw.float() / 255 - mean) / std
    assert torch.equal(augment.normalise(raw), expected)
    assert torch.equal(augment(raw, generator()), expected)
    assert torch.equal(Augment("none").normalise(raw), raw.float() / 255)


def test_floats_are_taken_as_0_to_1_already() -> None:
    raw = pictures(5, 3, 8, 8)
    augment = Augment("strong", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert torch.equal(augment(raw.float() / 255, generator()), augment(raw, generator()))


def test_event_frames_keep_their_counts_with_the_nmnist_constants() -> None:
    from neurocl.data import load_benchmark

    benchmark = load_benchmark("seq-nmnist")
    frames = pictures(3, 5, 2, 34, 34)
    counts = Augment(benchmark.augment, benchmark.mean, benchmark.std).normalise(frames)
    assert torch.allclose(counts, frames.float(), rtol=1e-6)


@pytest.mark.parametrize("mode", ["crop-flip", "strong"])
def test_all_time_frames_of_a_sample_move_together(mode: str) -> None:
    raw = pictures(8, 1, 3, 6, 6)
    repeated = Augment(mode)(raw.expand(8, 4, 3, 6, 6), generator(5))  # type: ignore[arg-type]
    assert torch.equal(repeated, repeated[:, :1].expand_as(repeated))
    assert torch.equal(repeated[:, 0], Augment(mode)(raw[:, 0], generator(5)))  # type: ignore[arg-type]


def test_what_happens_to_a_sample_does_not_depend_on_its_neighbours() -> None:
    raw, other = pictures(6, 3, 8, 8), pictures(6, 3, 8, 8)
    other[1:] = 0
    for mode in ("crop-flip", "strong"):
        augment = Augment(mode)  # type: ignore[arg-type]
        assert torch.equal(augment(raw, generator())[0], augment(other, generator())[0])


def test_shifts_and_flips_are_uniform() -> None:
    # a single white pixel in the middle tells the draw
    raw = torch.zeros(20_000, 1, 17, 17, dtype=torch.uint8)
    raw[:, :, 8, 4] = 255
    seen = Augment("crop-flip")(raw, generator()).flatten(1)
    assert torch.equal(seen.sum(1), torch.ones(20_000))
    where = seen.argmax(1)
    rows = torch.bincount(where // 17, minlength=17)[4:13]
    assert rows.sum() == 20_000
    assert (rows - 20_000 / 9).abs().max() < 5 * (20_000 / 9) ** 0.5
    # mirrored samples have the pixel in the right half (columns 8 is reached both ways)
    columns = where % 17
    right = int((columns > 8).sum()) + int((columns == 8).sum()) / 2
    assert abs(right - 10_000) < 5 * 20_000**0.5 / 2


def test_hue_equals_the_standard_library() -> None:
    colours = torch.rand(500, 3, 1, 1, generator=generator())
    # the borders between sectors, and grey
    colours[:6] = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 0, 0], [0.5, 0.5, 0.5], [0, 0, 0]])[
        :, :, None, None
    ]
    turn = torch.rand(500, 1, 1, generator=generator(1)) * 2 - 1
    for before, amount, after in zip(colours, turn, turn_hue(colours, turn), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.flatten().tolist())
        expected = colorsys.hsv_to_rgb((h + float(amount)) % 1.0, s, v)
        assert after.flatten().tolist() == pytest.approx(expected, abs=2e-6)


def test_jitter_without_strength_changes_nothing() -> None:
    raw = torch.rand(4, 3, 5, 5, generator=generator())
    assert torch.allclose(colour_jitter(raw, torch.zeros(4, 4)), raw, atol=1e-6)


def test_jitter_changes_brightness_and_contrast_by_their_factors() -> None:
    raw = torch.rand(2, 1, 5, 5, generator=generator()) * 0.4 + 0.3
    brighter = colour_jitter(raw, torch.tensor([[0.5, 0, 0, 0]] * 2))
    assert torch.allclose(brighter, raw * 1.1)
    flatter = colour_jitter(raw, torch.tensor([[0, -1.0, 0, 0]] * 2))
    assert torch.allclose(flatter.std((1, 2, 3)), 0.8 * raw.std((1, 2, 3)), rtol=1e-5)
    assert torch.allclose(flatter.mean((1, 2, 3)), raw.mean((1, 2, 3)))


def test_jitter_keeps_pictures_in_range_and_grey_pictures_grey() -> None:
    raw = pictures(64, 3, 6, 6)
    strong = Augment("strong")(raw, generator())
    assert strong.min() >= 0
    assert strong.max() <= 1
    grey = Augment("strong")(raw[:, :1].expand(64, 3, 6, 6), generator())
    assert torch.allclose(grey, grey[:, :1].expand_as(grey), atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="unknown augmentation 'crop_flip'; did you mean 'crop-flip'"):
        Augment("crop_flip")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="mean and std go together"):
        Augment("none", (0.5,), None)
    with pytest.raises(UserError, match="std must be positive"):
        Augment("none", (0.5,), (0.0,))
    with pytest.raises(ValueError, match=r"a batch has shape .* got \[3, 8, 8\]"):
        Augment("crop-flip")(pictures(3, 8, 8), generator())
    with pytest.raises(ValueError, match="mean has 1 channels, the pictures have 3"):
        Augment("none", (0.5,), (0.5,)).normalise(pictures(2, 3, 8, 8))
    with pytest.raises(ValueError, match="colour jitter needs 1 or 3 channels, got 2"):
        Augment("strong")(pictures(2, 2, 8, 8), generator())


@pytest.mark.gpu
def test_the_device_makes_no_difference() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    raw, augment = pictures(16, 3, 8, 8), Augment("strong", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    there = augment(raw.cuda(), generator())
    assert there.is_cuda
    assert torch.allclose(there.cpu(), augment(raw, generator()), atol=1e-5)
