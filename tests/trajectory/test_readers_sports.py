"""What the files of matches say: different formats of the same play agree."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.trajectory.readers import read_recordings, read_tracks
from neurocl.trajectory.scenes import TrackSet
from tests.trajectory.real_data import real_file


def paths(tracks: TrackSet) -> dict[str, Any]:
    return {name: tracks.xy[tracks.agent == agent] for agent, name in enumerate(tracks.agent_names)}


def matches(path: Path, **changes: Any) -> Path:
    """Two NBA sequences of 3 and 2 rows: agent a of sequence s is at (a + row, 10 s) feet."""
    rows = np.array([0, 1, 2, 0, 1])
    sequence = np.array([0, 0, 0, 1, 1])
    place = np.zeros((5, 11, 2), dtype=np.int64)
    place[..., 0] = 100 * (np.arange(11) + rows[:, None])
    place[..., 1] = 1000 * sequence[:, None]
    delta = np.concatenate([place[:1], np.diff(place[:3], axis=0), place[3:4], np.diff(place[3:], axis=0)])
    arrays: dict[str, Any] = {
        "delta_xy": delta.astype(np.int16),
        "start": np.array([0, 3, 5]),
        "agent_id": np.tile(np.arange(100, 111), (2, 1)),
        "game": np.array(["1", "2"]),
        "quarter": np.array([1, 4], dtype=np.int8),
        "clock": np.array([[100.0, 99.76], [5.0, 4.88]]),
    }
    np.savez(path, **(arrays | changes))
    return path


def test_nba_sequences_are_sums_of_differences_in_hundredths_of_a_foot(tmp_path: Path) -> None:
    first, second = read_recordings(matches(tmp_path / "nba.npz"))
    assert (first.name, second.name) == ("nba:1-q1-100.00", "nba:2-q4-5.00")
    assert first.agent_names == (*map(str, range(100, 110)), "ball")
    assert first.kind == ("home",) * 5 + ("visitor",) * 5 + ("ball",)
    assert paths(first)["103"].tolist() == [[3, 0], [4, 0], [5, 0]]
    assert paths(second)["ball"].tolist() == [[10, 10], [11, 10]]
    assert np.unique(first.time) == pytest.approx([0.0, 0.12, 0.24])


@pytest.mark.parametrize(
    "changes",
    [
        {"start": np.array([0, 3, 6])},
        {"start": np.array([0, 5, 3])},
        {"agent_id": np.zeros((2, 5), dtype=np.int64)},
        {"delta_xy": np.zeros((5, 11, 3), dtype=np.int16)},
        {"game": np.array(["1"])},
    ],
)
def test_arrays_that_do_not_fit_are_a_mistake(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="do not fit together"):
        read_recordings(matches(tmp_path / "nba.npz", **changes))


def test_an_npy_of_eleven_agents_is_basketball(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 30, 11, 2)).astype(np.float32)
    np.save(tmp_path / "nba_test.npy", values)
    found = read_recordings(tmp_path / "nba_test.npy")
    assert [tracks.name for tracks in found] == ["nba_test:0", "nba_test:1", "nba_test:2"]
    assert (found[0].unit, found[0].hz) == ("ft", 5.0)
    assert np.array_equal(found[1].xy.reshape(30, 11, 2), values[1].astype(np.float64))


def test_pickles_in_an_npy_are_never_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="no pickles"):
        read_recordings(tmp_path / "evil.npy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 4)), "shape"),
        (np.full((1, 2, 3, 2), np.nan), r"not a finite number at index \[0, 0, 0, 0\]"),
    ],
)
def test_an_npy_of_another_shape_or_with_nan_is_a_mistake(tmp_path: Path, values: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(UserError, match=message):
        read_recordings(tmp_path / "a.npy")


def test_a_cut_npy_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 3, 4, 2)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged npy"):
        read_recordings(path)


def event(number: int, moments: list[Any]) -> dict[str, Any]:
    return {"eventId": str(number), "home": {"teamid": 1}, "visitor": {"teamid": 2}, "moments": moments}


def moment(clock: float, quarter: int = 1, agents: int = 11) -> list[Any]:
    players = [[1 if index < 5 else 2, 100 + index, clock, index, 0.0] for index in range(10)]
    return [quarter, 0, clock, None, None, [[-1, -1, 50.0, 25.0, 3.0], *players][:agents]]


def test_sportvu_moments_count_once_and_a_jump_of_the_clock_begins_a_recording(tmp_path: Path) -> None:
    clocks = [100.0, 99.96, 99.92]
    events = [
        event(1, [moment(clock) for clock in clocks]),
        event(2, [moment(clock) for clock in [99.92, 99.88, 99.84]]),  # overlaps
        event(3, [moment(60.0, agents=10)]),  # somebody is missing
        event(4, [moment(50.0), moment(49.96)]),
        event(5, [moment(100.0, quarter=2), moment(99.96, quarter=2)]),
    ]
    path = tmp_path / "game.json"
    path.write_text(json.dumps({"gameid": "1", "events": events}), encoding="utf-8")
    found = read_recordings(path)
    assert [len(np.unique(tracks.time)) for tracks in found] == [5, 2, 2]
    assert found[0].hz == pytest.approx(25)
    assert Counter(found[0].kind) == {"home": 5, "visitor": 5, "ball": 1}
    assert paths(found[0])["104"][:, 0].tolist() == [100.0, 99.96, 99.92, 99.88, 99.84]


def test_sportvu_events_are_read_one_by_one_whatever_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurocl.trajectory.readers_sports.CHUNK", 64)
    events = [event(number, [moment(100 - number * 0.04)]) for number in range(5)]
    path = tmp_path / "game.json"
    path.write_text(json.dumps({"events": events}), encoding="utf-8")
    assert len(np.unique(read_tracks(path).time)) == 5
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    with pytest.raises(UserError, match=r"game.json:5: event 5 is cut or damaged"):
        read_tracks(path)


def test_sportvu_and_socialvae_files_hold_the_sequences_of_the_npz() -> None:
    known = {tracks.name.split(":")[1]: tracks for tracks in read_recordings(real_file("nba/nba_score_train.npz"))}
    text = read_tracks(real_file("nba/formats/score_ATL_BKN_0021500159_1_474.0_467.0.txt.gz"))
    same = known["0021500159-q1-474.00"]
    assert set(text.agent_names) == set(same.agent_names)
    for name, path in paths(text).items():
        assert np.abs(path - paths(same)[name]).max() <= 0.0051
    sportvu = read_recordings(real_file("nba/formats/sportvu_sample.json.gz"))[0]
    assert sorted(zip(sportvu.agent_names, sportvu.kind, strict=True)) == sorted(
        zip(same.agent_names, same.kind, strict=True)
    )
    for name, path in paths(sportvu).items():
        assert np.abs(path - paths(same)[name]).max() <= 0.0151


def test_big_data_bowl_tables_of_both_ages_give_the_same_play(tmp_path: Path) -> None:
    old = "time,x,y,s,dis,dir,event,nflId,displayName,jerseyNumber,team,frame.id,gameId,playId\n"
    new = "gameId,playId,nflId,displayName,frameId,time,jerseyNumber,club,playDirection,x,y,s,a,dis,o,dir,event\n"
    for frame in (1, 2):
        old += f"T,{frame}.5,2,0,0,1,NA,77,Ann Bee,75,away,{frame},9,8\nT,3,4,0,0,NA,NA,,football,,ball,{frame},9,8\n"
        new += f"9,8,77,Ann Bee,{frame},T,75,TB,left,{frame}.5,2,0,NA,0,1,1,NA\n"
        new += f"9,8,NA,football,{frame},T,NA,football,left,3,4,0,NA,0,NA,NA,NA\n"
    found = []
    for text in (old, new):
        path = tmp_path / "tracking.csv"
        path.write_text(text, encoding="utf-8")
        found.append(read_tracks(path))
    assert np.array_equal(found[0].xy, found[1].xy)
    assert found[0].agent_names == found[1].agent_names == ("77", "ball")
    assert (found[0].kind, found[1].kind) == (("visitor", "ball"), ("other", "ball"))
    assert found[0].name == "tracking:9-8"
    assert np.diff(np.unique(found[0].time)) == pytest.approx([0.1])


def test_next_gen_stats_rows_repeated_for_two_events_count_once(tmp_path: Path) -> None:
    header = "gameId\tplayId\tpossessionFlag\tframe\tdisplayName\tnflId\tx\ty\tevent\n"
    row = "1\t2\t0.0\t0\tA\t5.0\t3\t4\t"
    path = tmp_path / "ngs.tsv"
    path.write_text(header + row + "snap\n" + row + "pass\n1\t2\t\t0\tball\t\t9\t9\t\n", encoding="utf-8")
    tracks = read_tracks(path)
    assert len(tracks.time) == 2
    assert tracks.kind == ("defence", "ball")


def test_next_gen_stats_files_hold_the_plays_of_the_npz() -> None:
    name = "2018090903-2956"
    text = read_tracks(real_file(f"nfl/formats/ngs_{name.replace('-', '_')}.tsv.gz"))
    known = {tracks.name.split(":")[1]: tracks for tracks in read_recordings(real_file("nfl/nfl_train.npz"))}[name]
    for agent, path in paths(text).items():
        assert np.abs(path - paths(known)[agent]).max() <= 0.0051
    assert dict(zip(text.agent_names, text.kind, strict=True)) == dict(zip(known.agent_names, known.kind, strict=True))
