"""Rates, units, views and directions: exact where the curve is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.trajectory.readers import read_recordings
from neurocl.trajectory.resample import (
    FIELD_YARDS,
    dense_linear,
    in_unit,
    offence_to_right,
    on_common_grid,
    read_homography,
    through_homography,
    to_rate,
)
from neurocl.trajectory.scenes import TrackSet
from tests.trajectory.real_data import real_file


def tracks_at(times: list[list[float]], curve: str = "line", hz: float = 2.0, unit: str = "m") -> TrackSet:
    """One agent per list of times, on a line or a parabola."""
    time = np.concatenate([np.array(own) for own in times])
    agent = np.concatenate([np.full(len(own), index) for index, own in enumerate(times)])
    order = np.lexsort((agent, time))
    time, agent = time[order], agent[order]
    x = 3 * time + agent if curve == "line" else time**2 - time
    return TrackSet(
        name="walk",
        time=time,
        agent=agent.astype(np.int64),
        xy=np.stack([x, 1 - 2 * x], axis=1),
        agent_names=tuple(str(index) for index in range(len(times))),
        kind=("pedestrian",) * len(times),
        unit=unit,
        hz=hz,
        frame=np.round(time * 100).astype(np.int64),
    )


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_a_line_stays_a_line_at_any_rate(method: str) -> None:
    tracks = tracks_at([[0.0, 0.4, 1.1, 1.5, 2.0], [0.5, 1.0, 1.5]])
    for hz in (1.0, 3.0, 7.5):
        new = to_rate(tracks, hz, method=method, max_gap=1.0)  # type: ignore[arg-type]
        assert new.hz == hz
        assert new.xy[:, 0] == pytest.approx(3 * new.time + new.agent)
        assert new.time == pytest.approx(new.frame / hz)
        assert set(new.agent) == {0, 1}


def test_cubic_curves_are_exact_on_parabolas_at_uneven_times() -> None:
    tracks = tracks_at([[0.0, 0.4, 1.1, 1.5, 2.0]], curve="parabola")
    new = to_rate(tracks, 10.0, method="cubic", max_gap=1.0)
    assert new.xy[:, 0] == pytest.approx(new.time**2 - new.time)
    assert np.abs(to_rate(tracks, 10.0, max_gap=1.0).xy[:, 0] - (new.time**2 - new.time)).max() > 0.01


def test_rows_are_kept_where_old_and_new_times_meet() -> None:
    tracks = tracks_at([[0.0, 0.5, 1.0, 1.5], [0.5, 1.0]])
    assert np.array_equal(to_rate(tracks, 2.0).xy, tracks.xy)
    new = to_rate(tracks, 1.0)
    assert new.time.tolist() == [0.0, 1.0, 1.0]


def test_nobody_is_seen_before_the_first_or_after_the_last_row() -> None:
    new = to_rate(tracks_at([[0.0, 4.0], [1.3, 2.7]]), 2.0, max_gap=10.0)
    assert new.time[new.agent == 1].tolist() == [1.5, 2.0, 2.5]


def test_long_gaps_are_not_filled() -> None:
    tracks = tracks_at([[0.0, 0.5, 1.0, 3.0, 3.5]])
    assert to_rate(tracks, 4.0).time.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 3.0, 3.25, 3.5]
    assert len(to_rate(tracks, 4.0, max_gap=2.0).time) == 15


def test_the_grid_may_begin_anywhere() -> None:
    new = to_rate(tracks_at([[0.0, 0.5, 1.0, 1.5]]), 2.0, origin=1.25)
    assert new.time.tolist() == [0.25, 0.75, 1.25]
    assert new.frame.tolist() == [-2, -1, 0]


def test_a_single_row_survives_only_on_the_grid() -> None:
    new = to_rate(tracks_at([[0.0, 0.5, 1.0], [0.5], [0.6]]), 2.0)
    assert new.agent.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("hz", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_positive(hz: float) -> None:
    with pytest.raises(UserError, match="hz must be above 0"):
        to_rate(tracks_at([[0.0, 1.0]]), hz)


def test_an_absurd_rate_is_refused_before_memory_is_gone() -> None:
    with pytest.raises(UserError, match="hundred million"):
        to_rate(tracks_at([[0.0, 1000.0]]), 1e9)


def test_dense_interpolation_agrees_with_numpy() -> None:
    xy = np.random.default_rng(0).normal(size=(29, 3, 2))
    new = dense_linear(xy, 0.12, 0.2)
    assert len(new) == 17  # 28 * 0.12 s = 3.36 s
    for agent in range(3):
        for axis in range(2):
            expected = np.interp(np.arange(17) * 0.2, np.arange(29) * 0.12, xy[:, agent, axis])
            assert new[:, agent, axis] == pytest.approx(expected, abs=1e-12)


def test_dense_interpolation_reaches_a_last_row_that_lies_on_the_grid() -> None:
    assert dense_linear(np.arange(6.0)[:, None], 0.12, 0.2)[:, 0] == pytest.approx([0, 5 / 3, 10 / 3, 5])
    assert dense_linear(np.arange(1.0)[:, None], 0.12, 0.2).tolist() == [[0.0]]


def test_a_common_grid_is_one_without_times_in_between() -> None:
    assert on_common_grid(tracks_at([[0.0, 0.5, 1.0], [0.5, 1.0, 3.0]]))
    assert not on_common_grid(tracks_at([[0.0, 0.5, 1.0], [0.25, 0.75]]))


def test_units_are_converted_there_and_back() -> None:
    tracks = tracks_at([[0.0, 1.0]], unit="ft")
    metres = in_unit(tracks, "m")
    assert metres.xy == pytest.approx(tracks.xy * 28 / 94)
    assert in_unit(metres, "ft").xy == pytest.approx(tracks.xy)
    assert in_unit(tracks_at([[0.0, 1.0]], unit="yd"), "m").xy == pytest.approx(tracks.xy * 0.9144)
    assert in_unit(metres, "m") is metres
    pixels = in_unit(metres, "px", metres_per_pixel=0.05)
    assert pixels.xy == pytest.approx(metres.xy * 20)
    for wrong in (lambda: in_unit(pixels, "m"), lambda: in_unit(metres, "mile")):
        with pytest.raises(UserError, match=r"metres_per_pixel|unknown unit 'mile'"):
            wrong()


def test_a_homography_maps_corners_to_corners() -> None:
    tracks = tracks_at([[0.0, 1.0]], unit="px")
    tracks = TrackSet(**(vars(tracks) | {"xy": np.array([[0.0, 0.0], [100.0, 50.0]])}))
    matrix = np.array([[0.1, 0.0, 1.0], [0.0, 0.2, 2.0], [0.001, 0.0, 1.0]])
    assert through_homography(tracks, matrix).xy == pytest.approx(np.array([[1, 2], [11 / 1.1, 12 / 1.1]]))
    turned = through_homography(tracks, matrix, rows_first=True)
    assert turned.xy[1] == pytest.approx(np.array([6 / 1.05, 22 / 1.05]))
    assert turned.unit == "m"
    back = through_homography(through_homography(tracks, matrix), np.linalg.inv(matrix), unit="px")
    assert back.xy == pytest.approx(tracks.xy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 0 0\n0 1 0\n", "3 lines of 3 numbers"),
        ("1 0 0\n0 1\n", ":2: 2 columns"),
        ("1 2 3\n2 4 6\n0 0 1\n", "inverted"),
    ],
)
def test_a_broken_homography_is_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "H.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_homography(path)


def test_the_horizon_is_a_mistake() -> None:
    matrix = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    with pytest.raises(UserError, match="horizon"):
        through_homography(tracks_at([[0.0, 1.0]]), matrix)


def play(offence_x: float, defence_x: float) -> TrackSet:
    tracks = tracks_at([[0.0, 0.1], [0.0, 0.1]], unit="yd")
    xy = np.array([[offence_x, 10.0], [defence_x, 20.0], [offence_x + 1, 10.0], [defence_x, 20.0]])
    return TrackSet(**(vars(tracks) | {"xy": xy, "kind": ("offence", "defence")}))


def test_plays_to_the_left_are_turned_by_half_a_circle() -> None:
    assert offence_to_right(play(30, 40)).xy.tolist() == play(30, 40).xy.tolist()
    turned = offence_to_right(play(40, 30))
    assert turned.xy == pytest.approx(np.array(FIELD_YARDS) - play(40, 30).xy)
    assert offence_to_right(turned).xy.tolist() == turned.xy.tolist()
    assert offence_to_right(play(30, 40), "left").xy[0, 0] == 90.0
    with pytest.raises(UserError, match="who is offence is not known"):
        offence_to_right(tracks_at([[0.0, 1.0]], unit="yd"))


def test_recorded_plays_tell_their_direction() -> None:
    import json

    path = real_file("nfl/nfl_val.npz")
    with np.load(path) as arrays:
        directions = [json.loads(text)["playDirection"] for text in arrays["meta"]]
    for tracks, direction in zip(read_recordings(path), directions, strict=True):
        assert (offence_to_right(tracks) is tracks) == (direction == "right")
