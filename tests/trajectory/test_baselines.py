"""The baselines: exact on motions they are made for, equivariant, and equal to independent references."""

import math

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.baselines import (
    ConstantVelocity,
    LeastSquaresLine,
    NearestNeighbours,
    Ridge,
    all_baselines,
    filled,
    heading_frame,
    rotated,
    target_tracks,
)
from neurocl.trajectory.scenes import Scenes

GENERATOR = torch.Generator().manual_seed(0)


def test_gaps_lie_on_the_line_between_what_was_seen() -> None:
    rng = np.random.default_rng(0)
    past, seen = rng.normal(size=(50, 8, 2)), rng.random((50, 8)) < 0.4
    seen[np.arange(50), rng.integers(0, 8, 50)] = True
    nonsense = torch.from_numpy(np.where(seen[..., None], past, np.nan))
    found = filled(nonsense, torch.from_numpy(seen)).numpy()
    for row in range(50):
        known = np.flatnonzero(seen[row])
        for axis in range(2):
            expected = np.interp(np.arange(8), known, past[row, known, axis])
            np.testing.assert_allclose(found[row, :, axis], expected, rtol=1e-12, atol=1e-12)


def scenes_of(tracks: torch.Tensor, observed: int = 8) -> Scenes:
    """One agent per scene from tracks [M, T, 2]."""
    count, steps, _ = tracks.shape
    ones = torch.ones(count, 1, dtype=torch.bool)
    past, future = tracks[:, None, :observed].float(), tracks[:, None, observed:].float()
    return Scenes(
        past=past,
        future=future,
        agent_mask=ones,
        past_mask=ones[..., None].expand(-1, -1, observed),
        future_mask=ones[..., None].expand(-1, -1, steps - observed),
        target_mask=ones,
        kind=torch.zeros(count, 1, dtype=torch.int64),
        agent_id=torch.arange(count)[:, None],
        start=torch.zeros(count, dtype=torch.int64),
        recording=("made",) * count,
        unit="m",
        hz=2.5,
    )


def walks(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth random walks [M, 20, 2] that keep, more or less, their speed and turn at random."""
    generator = torch.Generator().manual_seed(seed)
    speed = 0.2 + torch.rand(count, 1, generator=generator, dtype=torch.float64)
    turn = torch.randn(count, 1, generator=generator, dtype=torch.float64) * 0.08
    start = torch.rand(count, 1, generator=generator, dtype=torch.float64) * 2 * math.pi
    angle = start + turn * torch.arange(20) + 0.03 * torch.randn(count, 20, generator=generator).cumsum(1)
    steps = torch.stack([speed * angle.cos(), speed * angle.sin()], dim=-1)
    return steps.cumsum(dim=1)


def straight(count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    velocity = torch.randn(count, 1, 2, generator=generator, dtype=torch.float64)
    origin = torch.randn(count, 1, 2, generator=generator, dtype=torch.float64)
    return origin + velocity * torch.arange(20)[:, None]


@pytest.mark.parametrize("baseline", [ConstantVelocity(12), LeastSquaresLine(12)], ids=lambda b: b.name)
def test_straight_lines_are_forecast_exactly(baseline):
    tracks = straight()
    torch.testing.assert_close(baseline.forecast(tracks[:, :8], 1, GENERATOR)[0], tracks[:, 8:], rtol=1e-9, atol=1e-9)


def test_the_least_squares_line_equals_numpys_polynomial_fit():
    past = walks(4)[:, :8]
    found = LeastSquaresLine(12).forecast(past, 1, GENERATOR)[0]
    for agent in range(4):
        for axis in range(2):
            line = np.polyfit(np.arange(8), past[agent, :, axis].numpy(), 1)
            expected = np.polyval(line, np.arange(8, 20))
            np.testing.assert_allclose(found[agent, :, axis].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_a_vanishing_ridge_equals_least_squares_in_the_heading_frame():
    tracks = torch.randn(300, 20, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).cumsum(1)
    ridge = Ridge(12, strength=1e-10)
    ridge.fit(scenes_of(tracks))
    past, future = target_tracks(scenes_of(tracks))
    frame = heading_frame(past)
    turned = torch.einsum("mij,mtj->mti", frame, past - past[:, -1:])[:, :-1].flatten(1).numpy()
    target = torch.einsum("mij,mtj->mti", frame, future - past[:, -1:]).flatten(1).numpy()
    design = np.concatenate([turned, np.ones((len(turned), 1))], axis=1)
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    predicted = torch.from_numpy(design @ weights).view(300, 12, 2)
    expected = past[:, -1:] + torch.einsum("mji,mtj->mti", frame, predicted)
    torch.testing.assert_close(ridge.forecast(past, 1, GENERATOR)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("baseline", all_baselines(12), ids=lambda b: b.name)
def test_turning_and_shifting_the_world_turns_and_shifts_every_forecast(baseline):
    baseline.fit(scenes_of(walks(400)))
    past = walks(6, seed=5)[:, :8]
    angle = torch.tensor(1.1, dtype=torch.float64)
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    plain = baseline.forecast(past, 5, torch.Generator().manual_seed(3))
    turned = baseline.forecast(rotated(past, angle.expand(6, 8)) + shift, 5, torch.Generator().manual_seed(3))
    torch.testing.assert_close(turned, rotated(plain, angle.expand(plain.shape[:-1])) + shift, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("baseline", all_baselines(12), ids=lambda b: b.name)
def test_every_baseline_gives_the_number_of_forecasts_it_was_asked_for(baseline):
    baseline.fit(scenes_of(walks(400)))
    found = baseline.forecast(walks(3, seed=2)[:, :8], 7, GENERATOR)
    assert found.shape == (1 if baseline.deterministic else 7, 3, 12, 2)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("baseline", all_baselines(12), ids=lambda b: b.name)
def test_who_stands_still_gives_no_nan(baseline):
    baseline.fit(scenes_of(walks(400)))
    still = torch.full((2, 8, 2), 4.0, dtype=torch.float64)
    assert torch.isfinite(baseline.forecast(still, 5, GENERATOR)).all()


def test_heading_noise_has_the_spread_that_was_asked_for():
    past = straight(1)[:, :8]
    found = ConstantVelocity(12, heading_noise=25.0).forecast(past, 20_000, torch.Generator().manual_seed(0))
    way = found[:, 0, 0] - past[0, -1]
    straight_on = past[0, -1] - past[0, -2]
    angle = torch.atan2(way[:, 1], way[:, 0]) - torch.atan2(straight_on[1], straight_on[0])
    angle = torch.atan2(angle.sin(), angle.cos())
    assert float(angle.std()) == pytest.approx(math.radians(25), rel=0.03)


def test_a_training_past_finds_its_own_future_again():
    tracks = walks(300)
    nearest = NearestNeighbours(12)
    nearest.fit(scenes_of(tracks))
    past, future = target_tracks(scenes_of(tracks))
    found = nearest.forecast(past[:10], 200, torch.Generator().manual_seed(0))
    error = (found - future[:10]).norm(dim=-1).mean(dim=-1).min(dim=0).values
    assert float(error.max()) < 1e-5


def test_anchors_beat_the_plain_ridge_on_turning_walks():
    train, test = scenes_of(walks(2000)), walks(200, seed=9)
    errors = []
    for baseline in (Ridge(12), Ridge(12, anchors=True)):
        baseline.fit(train)
        found = baseline.forecast(test[:, :8], 20, GENERATOR)
        errors.append(float((found - test[:, 8:]).norm(dim=-1).mean(dim=-1).min(dim=0).values.mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("baseline", [Ridge(12), NearestNeighbours(12)], ids=lambda b: b.name)
def test_forecasting_before_fitting_is_refused(baseline):
    with pytest.raises(UserError, match="must be fitted"):
        baseline.forecast(walks(2)[:, :8], 5, GENERATOR)
