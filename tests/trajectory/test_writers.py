"""What is written is read back unchanged, and other tools find what they expect."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.readers import read_recordings, read_tracks
from neurocl.trajectory.scenes import KINDS, Forecast, TrackSet
from neurocl.trajectory.writers import WRITTEN, write_forecast, write_tracks
from tests.trajectory.real_data import real_file


def recording(seed: int, unit: str = "m", hz: float = 2.5, step: int = 10, name: str = "walk") -> TrackSet:
    """Agents that come and go; times as readers compute them."""
    generator = np.random.default_rng(seed)
    seen = generator.random((30, 9)) < 0.7
    seen[0] = seen[:2, 0] = True
    frame, agent = np.nonzero(seen)
    return TrackSet(
        name=name,
        time=(frame * step) / (hz * step),
        agent=agent.astype(np.int64),
        xy=generator.normal(size=(len(frame), 2)) * 10,
        agent_names=tuple(["4", "17", "-3", "ball", 'Ann "A", Bee', "0007", "5.5", "x", "9"]),
        kind=KINDS,
        unit=unit,
        hz=hz,
        frame=(frame * step).astype(np.int64),
    )


def assert_same(one: TrackSet, other: TrackSet) -> None:
    assert (one.unit, one.hz, one.name) == (other.unit, other.hz, other.name)
    for tracks in (one, other):
        assert len(tracks.agent_names) == len(set(tracks.agent_names))
    rows = []
    for tracks in (one, other):
        names, kinds = np.array(tracks.agent_names)[tracks.agent], np.array(tracks.kind)[tracks.agent]
        columns = zip(tracks.time, tracks.frame, names, kinds, *tracks.xy.T, strict=True)
        rows.append(sorted(columns))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize(("unit", "hz", "step"), [("m", 2.5, 10), ("px", 30.0, 1), ("ft", 100 / 12, 12)])
def test_tracks_are_read_back_exactly(tmp_path: Path, format: str, unit: str, hz: float, step: int) -> None:
    tracks = recording(0, unit, hz, step)
    # Readers give "7" and "0007" one name.
    tracks = TrackSet(
        **(vars(tracks) | {"agent_names": tuple(name.replace("0007", "7") for name in tracks.agent_names)})
    )
    path = tmp_path / f"walk.{format}"
    write_tracks(path, tracks)
    assert_same(tracks, read_tracks(path))


@pytest.mark.parametrize("format", ["csv", "npz", "json"])
def test_several_recordings_share_a_file(tmp_path: Path, format: str) -> None:
    parts = [recording(1, name="a, b"), recording(2, unit="yd", hz=10.0, step=1, name="c")]
    parts = [TrackSet(**(vars(part) | {"agent_names": tuple("abcdefghi")})) for part in parts]
    path = tmp_path / f"walks.{format}"
    write_tracks(path, parts)
    for before, after in zip(parts, read_recordings(path), strict=True):
        assert_same(before, after)


@pytest.mark.parametrize("format", ["ndjson", "csv", "json"])
def test_a_name_that_ends_in_gz_packs_the_text_always_to_the_same_bytes(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"walk.{format}.gz"
    write_tracks(path, recording(0))
    first = path.read_bytes()
    write_tracks(path, recording(0))
    assert path.read_bytes() == first
    assert gzip.decompress(first)
    assert len(read_tracks(path).time) == len(recording(0).time)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_recorded_files_survive_every_format(tmp_path: Path) -> None:
    for name in ("eth_ucy/biwi_eth.txt.gz", "nfl/formats/ngs_2018090903_2956.tsv.gz"):
        tracks = read_tracks(real_file(name))
        for format in WRITTEN:
            path = tmp_path / f"{tracks.name.replace(':', '-')}.{format}"
            write_tracks(path, tracks)
            again = read_tracks(path)
            assert_same(tracks, TrackSet(**(vars(again) | {"name": tracks.name})))


def test_ndjson_is_what_trajnetpp_tools_expect(tmp_path: Path) -> None:
    path = tmp_path / "walk.ndjson"
    write_tracks(path, recording(0))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {"id", "p", "s", "e", "fps", "tag"} <= set(lines[0]["scene"])
    assert all(set(line["track"]) == {"f", "p", "x", "y"} for line in lines[1:])
    assert {type(line["track"]["p"]) for line in lines[1:]} == {int, str}


@pytest.mark.parametrize(
    ("name", "tracks", "message"),
    [
        ("walk.xls", recording(0), "cannot write 'xls'; there are ndjson, csv, npz, json"),
        ("walk.csv", [], "no rows of tracks to write"),
        ("walk.ndjson", [recording(0), recording(1)], "ndjson holds one recording, got 2"),
        ("no/such/folder/walk.csv", recording(0), "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path: Path, name: str, tracks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_tracks(tmp_path / name, tracks)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "walk.csv"
    path.write_text("old", encoding="utf-8")

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neurocl.trajectory.writers._quoted", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_tracks(path, recording(0))
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["walk.csv"]


def forecast() -> Forecast:
    generator = torch.Generator().manual_seed(0)
    return Forecast(
        trajectories=torch.randn(3, 2, 4, 2, generator=generator),
        probabilities=torch.tensor([[0.5, 0.2], [0.3, 0.2], [0.2, 0.6]]),
        agents=("7", "ann"),
        hz=2.5,
        unit="m",
    )


def test_a_forecast_in_csv_has_a_row_per_forecast_agent_and_step(tmp_path: Path) -> None:
    write_forecast(tmp_path / "f.csv", forecast(), first_frame=100, frame_step=10)
    with (tmp_path / "f.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 2 * 4
    row = rows[2 * 4 + 4 + 1]
    assert (row["forecast"], row["agent"], row["step"], row["frame"]) == ("1", "ann", "2", "110")
    assert float(row["probability"]) == pytest.approx(0.2)
    value = forecast().trajectories[1, 1, 1]
    assert [float(row["x"]), float(row["y"])] == pytest.approx(value.tolist(), abs=1e-7)


def test_a_forecast_in_ndjson_has_prediction_numbers(tmp_path: Path) -> None:
    write_forecast(tmp_path / "f.ndjson", forecast(), first_frame=100, frame_step=10, scene=4)
    lines = [json.loads(line) for line in (tmp_path / "f.ndjson").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["scene"] == {"id": 4, "p": 7, "s": 100, "e": 130, "fps": 2.5, "tag": 0}
    tracks = [line["track"] for line in lines[1:]]
    assert len(tracks) == 24
    assert {track["prediction_number"] for track in tracks} == {0, 1, 2}
    assert {track["scene_id"] for track in tracks} == {4}


def test_a_forecast_in_json_and_npz_holds_everything(tmp_path: Path) -> None:
    made = forecast()
    write_forecast(tmp_path / "f.json", made, first_frame=5)
    content = json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))
    assert content["frames"] == [5, 6, 7, 8]
    assert torch.allclose(torch.tensor(content["agents"]["ann"]["trajectories"]), made.trajectories[:, 1])
    assert torch.allclose(torch.tensor(content["agents"]["7"]["probabilities"]), made.probabilities[:, 0])
    write_forecast(tmp_path / "f.npz", made)
    with np.load(tmp_path / "f.npz") as arrays:
        assert np.array_equal(arrays["trajectories"], made.trajectories.numpy())
        assert arrays["agents"].tolist() == ["7", "ann"]
