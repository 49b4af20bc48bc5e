"""Windows are what a plain loop over windows and agents finds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory import windows as windows_module
from neurocl.trajectory.scenes import TrackSet
from neurocl.trajectory.windows import aligned, cut, cut_dense, last_window, without_overlap


def recording(seed: int, steps: int = 40, agents: int = 6, share: float = 0.9, name: str = "walk") -> TrackSet:
    """Agents with random gaps; three steps of the recording are missing altogether."""
    generator = np.random.default_rng(seed)
    seen = generator.random((steps, agents)) < share
    seen[[row for row in (15, 16, 30) if row < steps]] = False
    step, agent = np.nonzero(seen)
    return TrackSet(
        name=name,
        time=step * 0.4,
        agent=agent.astype(np.int64),
        xy=generator.normal(size=(len(step), 2)),
        agent_names=tuple(str(number) for number in range(agents)),
        kind=("pedestrian", "cyclist") * (agents // 2),
        unit="m",
        hz=2.5,
        frame=(10 * step + 3).astype(np.int64),
    )


def walking(steps: int, agents: int = 2, hz: float = 2.5) -> TrackSet:
    step = np.repeat(np.arange(steps), agents)
    agent = np.tile(np.arange(agents), steps)
    return TrackSet(
        name="walk",
        time=step / hz,
        agent=agent,
        xy=np.stack([step.astype(float), agent.astype(float)], axis=1),
        agent_names=tuple(str(number) for number in range(agents)),
        kind=("pedestrian",) * agents,
        unit="m",
        hz=hz,
        frame=10 * step,
    )


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize(("stride", "least"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("chunk", [20_000_000, 100])
def test_cutting_finds_what_a_plain_loop_finds(
    monkeypatch: pytest.MonkeyPatch, partial: bool, stride: int, least: int, chunk: int
) -> None:
    monkeypatch.setattr(windows_module, "CHUNK_ENTRIES", chunk)
    recordings = [recording(0), recording(1, steps=25, name="other"), recording(2, steps=7, agents=2, name="short")]
    observed, predicted = 4, 5
    scenes = cut(recordings, observed, predicted, stride=stride, partial=partial, min_targets=least)
    found = 0
    for tracks in recordings:
        times = np.unique(tracks.time)
        for first in range(0, len(times) - 8, stride):
            steps = times[first : first + 9]
            if (np.diff(steps) > 0.5).any():
                continue
            rows = {
                agent: {
                    round(t / 0.4): xy
                    for t, a, xy in zip(tracks.time, tracks.agent, tracks.xy, strict=True)
                    if a == agent
                }
                for agent in range(tracks.num_agents)
            }
            numbers = [round(step / 0.4) for step in steps]
            masks = {agent: [number in held for number in numbers] for agent, held in rows.items()}
            complete = [agent for agent, mask in masks.items() if all(mask)]
            others = [agent for agent, mask in masks.items() if any(mask[:observed]) and not all(mask)]
            if len(complete) < least:
                continue
            expected = complete + (others if partial else [])
            assert scenes.recording[found] == tracks.name
            assert scenes.start[found] == 10 * numbers[0] + 3
            assert scenes.agent_id[found].tolist() == expected + [-1] * (scenes.num_agents - len(expected))
            assert scenes.target_mask[found].sum() == len(complete)
            assert scenes.target_mask[found, : len(complete)].all()
            for slot, agent in enumerate(expected):
                mask = torch.cat([scenes.past_mask[found, slot], scenes.future_mask[found, slot]])
                assert mask.tolist() == masks[agent]
                places = torch.cat([scenes.past[found, slot], scenes.future[found, slot]])
                for index, number in enumerate(numbers):
                    if masks[agent][index]:
                        assert places[index].tolist() == rows[agent][number].astype(np.float32).tolist()
                assert scenes.kind[found, slot] == agent % 2
            found += 1
    assert found == len(scenes) > 0


def test_a_recording_shorter_than_a_window_gives_no_scene() -> None:
    scenes = cut(walking(19), 8, 12)
    assert len(scenes) == 0
    assert scenes.past.shape == (0, 1, 8, 2)
    assert len(cut(walking(20), 8, 12)) == 1


def test_resampling_first_gives_windows_at_the_new_rate() -> None:
    scenes = cut(walking(100, hz=10.0), 4, 4, hz=2.5)
    assert scenes.hz == 2.5
    assert scenes.past[0, 0, :, 0].tolist() == [0, 4, 8, 12]


def test_agents_seen_in_turns_are_brought_to_common_times() -> None:
    tracks = walking(40)
    late = tracks.agent == 1
    turns = TrackSet(**(vars(tracks) | {"time": tracks.time + np.where(late, 0.2, 0.0)}))
    assert aligned(tracks) is tracks
    scenes = cut(turns, 4, 4)
    assert scenes.target_mask.sum(dim=1).max() == 2
    assert scenes.past[2, 1, :, 0].tolist() == pytest.approx([1.5, 2.5, 3.5, 4.5])


def test_a_second_recording_of_another_unit_or_rate_is_a_mistake() -> None:
    tracks = walking(30)
    with pytest.raises(UserError, match="different units"):
        cut([tracks, TrackSet(**(vars(tracks) | {"unit": "px"}))], 4, 4)
    with pytest.raises(UserError, match="different rates"):
        cut([tracks, walking(30, hz=5.0)], 4, 4)


@pytest.mark.parametrize("options", [{"num_observed": 0}, {"num_predicted": 0}, {"stride": 0}])
def test_numbers_below_one_are_mistakes(options: dict[str, int]) -> None:
    name = next(iter(options))
    values = {"num_observed": 8, "num_predicted": 12, "stride": 1} | options
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        cut(walking(30), values["num_observed"], values["num_predicted"], stride=values["stride"])


def test_a_result_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "MAX_CELLS", 1000)
    with pytest.raises(UserError, match="use a larger stride"):
        cut(walking(100), 8, 12)


def test_a_hundred_thousand_rows_are_cut_in_a_second() -> None:
    tracks = walking(2000, agents=50)
    begin = time.perf_counter()
    scenes = cut(tracks, 8, 12)
    assert time.perf_counter() - begin < 3.0
    assert scenes.num_targets == 1981 * 50


def test_dense_windows_keep_agents_in_order() -> None:
    xy = np.arange(10 * 3 * 2, dtype=np.float64).reshape(10, 3, 2)
    index = np.array([[0, 2, 4], [1, 3, 5]])
    scenes = cut_dense(
        xy,
        index,
        2,
        kind=("home", "visitor", "ball"),
        start=np.array([0, 1]),
        recording=("a", "b"),
        unit="m",
        hz=5.0,
        name="nba",
        counted=(True, True, False),
    )
    assert scenes.past[1, 2].tolist() == [xy[1, 2].tolist(), xy[3, 2].tolist()]
    assert scenes.future[0, 0].tolist() == [xy[4, 0].tolist()]
    assert scenes.target_mask.tolist() == [[True, True, False]] * 2
    assert scenes.kind[0].tolist() == [3, 4, 5]


def test_the_last_window_ends_now_and_masks_what_was_not_seen() -> None:
    tracks = walking(12, agents=4)
    # Agent 0 is complete, 1 came late, 2 has left, 3 has left before the window.
    gone = (tracks.agent == 1) & (tracks.frame < 90)
    gone |= (tracks.agent == 2) & (tracks.frame > 100)
    gone |= (tracks.agent == 3) & (tracks.frame > 50)
    tracks = TrackSet(**(vars(tracks) | {key: getattr(tracks, key)[~gone] for key in ("time", "agent", "xy", "frame")}))
    scenes = last_window(tracks, 5, 3)
    assert scenes.agent_id.tolist() == [[0, 1, 2]]
    assert scenes.target_mask.tolist() == [[True, True, False]]
    assert scenes.past_mask[0].int().tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert scenes.past[0, 0, :, 0].tolist() == [7, 8, 9, 10, 11]
    assert scenes.start.tolist() == [70]
    assert scenes.future.shape == (1, 3, 3, 2)
    assert not scenes.future_mask.any()


def test_the_last_window_of_a_complete_scene_is_the_past_of_its_window() -> None:
    tracks = walking(20, agents=3)
    whole = cut(tracks, 8, 12)
    early = tracks.frame < 80
    tracks = TrackSet(**(vars(tracks) | {key: getattr(tracks, key)[early] for key in ("time", "agent", "xy", "frame")}))
    now = last_window(tracks, 8, 12)
    assert torch.equal(now.past, whole.past)
    assert torch.equal(now.agent_id, whole.agent_id)
    assert torch.equal(now.start, whole.start)


def test_the_last_window_may_be_resampled_and_still_ends_now() -> None:
    scenes = last_window(walking(101, hz=10.0), 4, 3, hz=2.5)
    assert scenes.past[0, 0, :, 0].tolist() == pytest.approx([88, 92, 96, 100])
    assert scenes.start.tolist() == [880]


def test_one_position_is_enough_for_a_last_window() -> None:
    scenes = last_window(walking(1, agents=1), 8, 12)
    assert scenes.past_mask[0, 0].int().tolist() == [0] * 7 + [1]


def test_parts_without_overlap_share_no_step() -> None:
    scenes = cut([walking(100), TrackSet(**(vars(walking(100)) | {"name": "other"}))], 8, 12, stride=2)
    parts = without_overlap(scenes, (0.6, 0.2, 0.2), 200)
    used: set[tuple[str, int]] = set()
    for rows in parts:
        steps = {
            (scenes.recording[row], int(scenes.start[row]) + 10 * step) for row in rows.tolist() for step in range(20)
        }
        assert not used & steps
        used |= steps
    assert all(len(rows) for rows in parts)
