"""The synthetic crowd walks like a crowd: at walking speeds, around each other, through doors, and not predictably."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.crowd import PLACES, crowd_scenes, place_of, simulate, social_force
from neurocl.trajectory.datasets import load_scenes

NO_WALLS = np.empty((0, 2, 2))


def test_alone_a_walker_is_only_pulled_to_its_goal() -> None:
    force = social_force(np.zeros((1, 2)), np.zeros((1, 2)), np.array([[10.0, 0.0]]), np.array([1.3]), NO_WALLS)
    assert force == pytest.approx(np.array([[2.6, 0.0]]))  # 1.3 m/s within 0.5 s
    going = np.array([[1.3, 0.0]])
    assert social_force(np.zeros((1, 2)), going, np.array([[10.0, 0.0]]), np.array([1.3]), NO_WALLS) == pytest.approx(0)


def test_others_push_away_like_the_gradient_of_their_potential() -> None:
    position = np.array([[0.0, 0.0], [0.5, 0.3]])
    velocity = np.array([[0.0, 0.0], [-0.8, 0.1]])
    goal, speed = np.array([[9.0, 0.0], [-9.0, 0.0]]), np.array([1.0, 1.0])

    def potential(place: np.ndarray) -> float:
        apart = place - position[1]
        stride = velocity[1]
        total = np.linalg.norm(apart) + np.linalg.norm(apart - stride)
        return float(2.1 * np.exp(-0.5 * np.sqrt(total**2 - stride @ stride) / 0.3))

    alone = social_force(position[:1], velocity[:1], goal[:1], speed[:1], NO_WALLS)[0]
    push = social_force(position, velocity, goal, speed, NO_WALLS)[0] - alone
    step = 1e-5
    for axis in range(2):
        shift = step * np.eye(2)[axis]
        slope = (potential(position[0] + shift) - potential(position[0] - shift)) / (2 * step)
        assert push[axis] == pytest.approx(-slope, rel=1e-5)


def test_walls_push_straight_away_from_their_nearest_point() -> None:
    wall = np.array([[[-1.0, 0.0], [1.0, 0.0]]])
    place = np.array([[0.0, 0.3]])
    still = np.zeros((1, 2))
    pull = social_force(place, still, np.array([[5.0, 0.3]]), np.array([1.0]), NO_WALLS)
    push = social_force(place, still, np.array([[5.0, 0.3]]), np.array([1.0]), wall) - pull
    assert push[0, 0] == pytest.approx(0, abs=1e-12)
    assert push[0, 1] == pytest.approx(10 / 0.2 * np.exp(-0.3 / 0.2))


def test_two_in_one_spot_give_no_nan() -> None:
    place = np.zeros((2, 2))
    force = social_force(place, place, np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2), NO_WALLS)
    assert np.isfinite(force).all()


@pytest.mark.parametrize("place", PLACES)
def test_people_walk_at_walking_speed_and_keep_apart(place: str) -> None:
    tracks = simulate(place, 5)
    order = np.lexsort((tracks.time, tracks.agent))
    same = (np.diff(tracks.agent[order]) == 0) & (np.diff(tracks.frame[order]) == 1)
    speed = np.linalg.norm(np.diff(tracks.xy[order], axis=0), axis=1)[same] * tracks.hz
    assert 0.8 < np.median(speed) < 1.5
    assert speed.max() < 2.7
    closest = []
    for frame in np.unique(tracks.frame):
        here = tracks.xy[tracks.frame == frame]
        if len(here) > 1:
            apart = np.linalg.norm(here[:, None] - here[None], axis=2)
            closest.append(apart[np.triu_indices(len(here), 1)].min())
    assert np.median(closest) > 0.3
    assert np.abs(tracks.xy).max() < 15


def test_nobody_walks_through_the_wall_beside_the_door() -> None:
    tracks = simulate("bottleneck", 5)
    for agent in range(tracks.num_agents):
        path = tracks.xy[tracks.agent == agent]
        crossing = np.flatnonzero(np.sign(path[1:, 0]) != np.sign(path[:-1, 0]))
        assert (np.abs(path[crossing, 1]) < 1.1 + 0.5).all()


def test_the_same_past_leads_to_several_futures() -> None:
    generator = np.random.default_rng(0)
    for place, least in (("crossing", 3), ("bottleneck", 3), ("plaza", 3)):
        routes = [place_of(place).route(generator) for _ in range(300)]
        ends = np.array([route[-1] for route in routes if np.allclose(np.sign(route[0]), np.sign(routes[0][0]))])
        distinct = np.unique(np.round(ends / 6), axis=0)
        assert len(distinct) >= least


def test_the_same_seed_gives_the_same_people_and_another_gives_others() -> None:
    one, same, other = (simulate("plaza", seed, rows=30) for seed in (1, 1, 2))
    assert np.array_equal(one.xy, same.xy)
    assert one.xy.shape != other.xy.shape or not np.array_equal(one.xy, other.xy)


def test_splits_share_no_recording_and_are_called_synthetic_crowd() -> None:
    val, test = crowd_scenes("val"), load_scenes("crowd", "test")
    assert not set(val.recording) & set(test.recording)
    assert test.name == "crowd"
    assert (test.num_observed, test.num_predicted, test.hz, test.unit) == (8, 12, 2.5, "m")
    assert not torch.equal(crowd_scenes("val", seed=1).past[0], val.past[0])


def test_some_thousand_training_windows_take_a_few_seconds() -> None:
    begin = time.process_time()
    scenes = crowd_scenes("train")
    assert time.process_time() - begin < 15
    assert len(scenes) > 3000
    assert scenes.num_targets > 30_000


def test_unknown_places_and_splits_are_mistakes() -> None:
    with pytest.raises(UserError, match="no place 'beach'"):
        simulate("beach", 0)
    with pytest.raises(UserError, match="no split 'dev'"):
        crowd_scenes("dev")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rows must be at least 1"):
        simulate("plaza", 0, rows=0)
