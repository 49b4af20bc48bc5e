"""Court and field: the measures of the leagues, the same place on both halves, and where recorded balls go in."""

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.fields import field
from tests.trajectory.real_data import real_file


def extent(lines):
    points = np.concatenate(lines)
    return np.array([points.min(axis=0), points.max(axis=0)])


@pytest.mark.parametrize(
    ("name", "unit", "size"),
    [
        ("nba", "ft", (94.0, 50.0)),
        ("nba", "m", (28.0, 50 * 28 / 94)),
        ("nfl", "yd", (120.0, 160 / 3)),
        ("nfl", "m", (109.728, 48.768)),
    ],
)
def test_a_field_has_the_size_that_positions_have_in_that_unit(name, unit, size):
    ground = field(name, unit)
    assert ground.size == pytest.approx(size)
    np.testing.assert_allclose(extent(ground.lines), [(0, 0), size], atol=1e-9)
    np.testing.assert_allclose(extent(ground.lines[:1]), [(0, 0), size], atol=1e-9)


@pytest.mark.parametrize(("name", "unit"), [("nba", "ft"), ("nfl", "yd")])
def test_both_halves_and_both_sides_are_alike(name, unit):
    ground = field(name, unit)
    points = np.unique(np.concatenate(ground.lines).round(6), axis=0)
    for sign, shift in (((-1, 1), (ground.size[0], 0)), ((1, -1), (0, ground.size[1]))):
        mirrored = np.unique((points * sign + shift).round(6), axis=0)
        gaps = np.abs(points[:, None] - mirrored[None]).max(axis=-1).min(axis=1)
        assert gaps.max() < 1e-5


def test_the_three_point_line_keeps_its_distance_from_the_hoop():
    lines = field("nba", "ft").lines
    (line,) = (line for line in lines if len(line) == 63 and line[0, 0] == 0)
    distance = np.linalg.norm(line - (5.25, 25), axis=1)
    np.testing.assert_allclose(distance[1:-1], 23.75)
    np.testing.assert_allclose(line[[0, 1], 1], 3.0)
    np.testing.assert_allclose(line[[-2, -1], 1], 47.0)
    assert line[1, 0] == pytest.approx(5.25 + np.sqrt(23.75**2 - 22**2))


def test_football_lines_are_five_yards_apart_and_carry_the_yards_to_the_goal():
    ground = field("nfl", "yd")
    across = [line[0, 0] for line in ground.lines[1:] if np.ptp(line[:, 1]) > 50]
    np.testing.assert_allclose(across, np.arange(10, 111, 5))
    assert {(x, text) for x, _, text, _ in ground.numbers} >= {(20.0, "10"), (60.0, "50"), (100.0, "10")}


def test_fields_need_a_known_name_and_a_length():
    with pytest.raises(UserError, match="did you mean 'nfl'"):
        field("nlf")
    with pytest.raises(UserError, match="not in 'px'"):
        field("nba", "px")


def test_recorded_balls_are_most_often_seen_below_the_hoop_of_the_drawn_court():
    from neurocl.trajectory.datasets import load_scenes
    from neurocl.trajectory.scenes import KINDS

    folder = real_file("nba/nba_score_test.npz").parents[2]
    scenes = load_scenes("nba", "test", data_dir=folder)
    ball = torch.cat([scenes.past, scenes.future], dim=2)[scenes.kind == KINDS.index("ball")].reshape(-1, 2).numpy()
    court = field("nba", "m")
    hoops = [line.mean(axis=0) for line in court.lines if np.ptp(line, axis=0).max() < 0.5]
    assert len(hoops) == 2
    for hoop in hoops:
        near = ball[np.abs(ball - hoop).max(axis=1) < 1.5]
        counts, x, y = np.histogram2d(*near.T, bins=[np.arange(-1.5, 1.6, 0.3) + centre for centre in hoop])
        row, column = np.unravel_index(counts.argmax(), counts.shape)
        assert np.hypot(x[row] + 0.15 - hoop[0], y[column] + 0.15 - hoop[1]) < 0.5
