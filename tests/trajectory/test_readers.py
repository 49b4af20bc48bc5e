"""Files are recognised by what is in them; tables and JSON files of one's own are read; mistakes name file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.trajectory.readers import FORMATS, detect_format, read_recordings, read_tracks, recording_name
from neurocl.trajectory.rows import usual_step
from tests.trajectory.real_data import real_file

SAMPLES = {
    "eth-text": "780 1.0 8.46 3.59\n790 1.0 9.57 3.79\n",
    "obsmat": "  7.8e+02 1 8.4 0 3.5 1.6 0 0.1\n  7.86e+02 1 9.1 0 3.6 1.6 0 0.3\n",
    "vsp": "1 - the number of splines\n2 - Num of control points\n0 0 0 87.3 - (2D point, m_id)\n10 5 25 90 - (p)\n",
    "sdd": '0 10 20 30 40 0 0 0 0 "Pedestrian"\n0 12 22 32 42 1 0 0 1 "Pedestrian"\n',
    "trajnet-csv": "split,scene,track,frame,x_px,y_px\ntrain,gates_0,7,0,757.0,918.5\ntrain,gates_0,7,12,765.0,918.5\n",
    "ndjson": '{"scene": {"id": 0, "p": 1, "s": 0, "e": 0, "fps": 1}}\n{"track": {"f": 0, "p": 1, "x": 1, "y": 2}}\n',
    "socialvae": "0 -1 18.0 45.0 BALL\n0 2207 15.3 16.7 PLAYER\n12 -1 19 45 BALL\n",
    "bdb": "time,x,y,event,nflId,displayName,team,frame.id,gameId,playId\nT,1,2,NA,5,A B,home,1,3,4\n",
    "ngs": "gameId\tplayId\tpossessionFlag\tframe\tdisplayName\tnflId\tx\ty\n1\t2\t1.0\t0\tA\t5.0\t3\t4\n",
    "csv": "frame,id,x,y\n0,a,1,2\n1,a,2,2\n",
    "json": '{"a": [[0, 1, 2], [0.4, 2, 2]]}',
}


def write(tmp_path: Path, text: str, name: str = "scene.dat") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_are_recognised_by_their_content(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, SAMPLES[name])
    assert detect_format(path) == name
    tracks = read_tracks(path)
    assert len(tracks.time) >= 1
    assert tracks.num_agents >= 1


@pytest.mark.parametrize("name", SAMPLES)
def test_line_ends_of_windows_and_gzip_change_nothing(tmp_path: Path, name: str) -> None:
    plain = read_tracks(write(tmp_path, SAMPLES[name]))
    packed = tmp_path / "scene.gz"
    packed.write_bytes(gzip.compress(SAMPLES[name].replace("\n", "\r\n").encode()))
    again = read_tracks(packed)
    assert np.array_equal(plain.xy, again.xy)
    assert np.array_equal(plain.time, again.time)
    assert plain.agent_names == again.agent_names


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("0 1 2 3\n1 1 2\n", 2, "3 columns where 4 belong"),
        ("0 1 2 3\n1 1 x 3\n", 2, "'x' where a number belongs"),
        ("0 1 2 3\n1 1 nan 3\n", 2, "'nan' where a number belongs"),
        ("0 1 2 3\n0.5 1 2 3\n", 2, "frame 0.5 is not a whole number"),
        ("0 1 2 3\n1 1.5 2 3\n", 2, "agent 1.5 is not a whole number"),
        ("0 1 2 3\n1 1 2 3\n0 1 2 3\n", 3, "agent 1 has a second row at frame 0, the first is in line 1"),
        ("1 2 3\n", 1, "3 columns of numbers"),
        ("hello\n", 1, "no known format"),
        ("", 1, "the file is empty"),
        ("frame,id,x\n0,1,2\n", 1, "no column for y"),
        ("id,x,y\n0,1,2\n", 1, "no column for frame or time"),
        ("frame,id,x,y\n0,1,2,3\n0,2,3\n", 3, "3 columns where 4 belong"),
        ("frame,id,x,y\n0,1,2,\n", 2, "'' where a number belongs"),
        ("frame,id,x,y\n", 1, "no rows of tracks"),
        ('frame,id,x,y\n0,"a,1,2\n', 2, "a damaged line"),
        ('{"a": [[0, 1, 2],\n [1, 2 3]]}', 2, "not JSON"),
        ('{"a": [[0, 1]]}', 1, "agent a, point 0: \\[t, x, y\\] belongs here"),
        ('{"a": [[0, 1, null]]}', 1, "agent a, point 0: None where a number belongs"),
        ('{"a": [[0, 1, NaN]]}', 1, "agent a, point 0: nan where a number belongs"),
        ('{"a": []}', 1, "no rows of tracks"),
        ("[1, 2]", 1, "a JSON object"),
        ('{"track": {"f": 0, "p": 1, "x": 1, "y": 2}}\n{"track": {"f": 0, "p"\n', 2, "not JSON"),
        ('{"track": {"f": 0, "p": 1, "x": 1}}\n', 1, "a track row without 'y'"),
        ("2 - the number of splines\n1 - Num\n0 0 0 1\n", 3, "the file ends inside a spline"),
        ("0 1 2 3 4 5 0 0 0\n", 1, "9 columns of numbers"),
        ('0 1 2 3 4 5 0 0 0 "Biker"\n0 1 2 3 4 z 0 0 0 "Biker"\n', 2, "'z' where a frame number belongs"),
    ],
)
def test_mistakes_name_the_file_and_the_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=f"scene.dat:{line}: {what}") as caught:
        read_recordings(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(UserError, match=r"noise.bin:1: "):
        read_recordings(path)


def test_a_missing_file_and_a_folder_are_mistakes(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.txt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_recordings(path)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown format 'xls'; there are eth-text, obsmat"):
        read_recordings(write(tmp_path, "0 1 2 3"), "xls")


def test_unsorted_rows_are_sorted(tmp_path: Path) -> None:
    tracks = read_tracks(write(tmp_path, "20 1 2 0\n0 1 0 0\n10 1 1 0\n"))
    assert tracks.xy[:, 0].tolist() == [0, 1, 2]


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "when;who;east;north\n0;ann;1;2\n0.5;ann;2;2\n")
    tracks = read_tracks(path, columns={"time": "when", "agent": "who", "x": "east", "y": "north"})
    assert tracks.hz == 2
    assert tracks.agent_names == ("ann",)
    assert tracks.xy.tolist() == [[1, 2], [2, 2]]
    with pytest.raises(UserError, match="no column width"):
        read_tracks(path, columns={"x": "width"})
    with pytest.raises(UserError, match="no such column role 'z'"):
        read_tracks(path, columns={"z": "east"})


def test_a_time_beside_frame_numbers_is_not_taken_for_seconds(tmp_path: Path) -> None:
    tracks = read_tracks(write(tmp_path, "frame,timestamp,id,x,y\n0,1700000000,a,0,0\n6,1700000400,a,1,0\n"))
    assert tracks.time.tolist() == [0.0, 0.4]


def test_the_unit_may_stand_in_the_column_name_and_be_overruled(tmp_path: Path) -> None:
    path = write(tmp_path, "frame,id,x_px,y_px\n0,a,1,2\n")
    assert read_tracks(path).unit == "px"
    assert read_tracks(path, unit="yd").unit == "yd"
    with pytest.raises(UserError, match="unknown unit 'mile'"):
        read_tracks(path, unit="mile")


def test_the_rate_may_be_said(tmp_path: Path) -> None:
    path = write(tmp_path, "0 1 0 0\n6 1 1 0\n12 1 2 0\n")
    assert read_tracks(path, hz=5).time.tolist() == [0.0, 0.2, 0.4]
    with pytest.raises(UserError, match="hz must be above 0"):
        read_tracks(path, hz=0)


def test_several_recordings_need_a_choice(tmp_path: Path) -> None:
    path = write(tmp_path, "recording,frame,id,x,y\na,0,1,0,0\nb,0,1,5,5\n")
    assert [tracks.name for tracks in read_recordings(path)] == ["a", "b"]
    with pytest.raises(UserError, match=r"2 recordings \(a, b\); choose one"):
        read_tracks(path)
    assert read_tracks(path, recording="b").xy.tolist() == [[5, 5]]
    with pytest.raises(UserError, match="none is called 'c'"):
        read_tracks(path, recording="c")


def test_a_homography_brings_pixels_to_metres(tmp_path: Path) -> None:
    path = write(tmp_path, "frame,id,x_px,y_px\n0,a,10,20\n")
    matrix = tmp_path / "H.txt"
    np.savetxt(matrix, np.diag([0.1, 0.2, 1.0]))
    tracks = read_tracks(path, homography=matrix)
    assert tracks.unit == "m"
    assert tracks.xy == pytest.approx(np.array([[1.0, 4.0]]))


def test_a_simple_json_holds_seconds_and_metres(tmp_path: Path) -> None:
    tracks = read_tracks(write(tmp_path, json.dumps({"7": [[0.0, 1, 2], [0.4, 2, 3]], "8": [[0.4, 0, 0]]})))
    assert tracks.time.tolist() == [0.0, 0.4, 0.4]
    assert (tracks.unit, tracks.hz) == ("m", 2.5)
    assert tracks.agent_names == ("7", "8")


def test_recordings_are_called_like_their_file() -> None:
    assert recording_name(Path("a/b/crowds.v2.txt.gz")) == "crowds.v2"
    assert recording_name(Path("scene.ndjson")) == "scene"
    assert recording_name(Path("scene")) == "scene"


def test_every_format_has_a_summary_and_is_recognised_somewhere() -> None:
    assert set(SAMPLES) | {"sportvu", "npy", "npz"} == set(FORMATS)
    assert all(entry.summary for entry in FORMATS.values())


@pytest.mark.parametrize(
    ("name", "format", "recordings", "rows", "agents", "unit", "hz"),
    [
        ("eth_ucy/biwi_eth.txt.gz", "eth-text", 1, 5492, 360, "m", 2.5),
        ("eth_ucy/students001.txt.gz", "eth-text", 1, 21813, 415, "m", 2.5),
        ("eth_ucy/original/seq_eth_obsmat.txt.gz", "obsmat", 1, 8908, 360, "m", 2.5),
        ("eth_ucy/original/seq_hotel_obsmat.txt.gz", "obsmat", 1, 6544, 390, "m", 2.5),
        ("eth_ucy/original/ucy_zara01_annotation.vsp.gz", "vsp", 1, 5024, 148, "px", 2.5),
        ("sdd/sdd_trajnet.csv.gz", "trajnet-csv", 47, 226460, 11323, "px", 2.5),
        ("sdd/original/gates_6_annotations.txt.gz", "sdd", 1, 8004, 27, "px", 30.0),
        ("sdd/original/quad_0_annotations.txt.gz", "sdd", 1, 3425, 10, "px", 30.0),
        ("trajnetpp/biwi_hotel.ndjson.gz", "ndjson", 229, None, None, "m", 2.5),
        ("nba/nba_score_test.npz", "npz", 564, 56217 * 11, 564 * 11, "ft", 25 / 3),
        ("nba/formats/sportvu_sample.json.gz", "sportvu", 4, None, 44, "ft", 25 / 3),
        ("nba/formats/score_ATL_BKN_0021500159_1_474.0_467.0.txt.gz", "socialvae", 1, 649, 11, "ft", 25 / 3),
        ("nfl/nfl_test.npz", "npz", 77, 24984 * 23, 77 * 23, "yd", 10.0),
        ("nfl/formats/ngs_2018090903_2956.tsv.gz", "ngs", 1, 7613, 23, "yd", 10.0),
        ("nfl/formats/tracking_bdb2019_style.csv.gz", "bdb", 6, None, 6 * 23, "yd", 10.0),
        ("nfl/formats/tracking_bdb2024_style.csv.gz", "bdb", 6, None, 6 * 23, "yd", 10.0),
    ],
)
def test_recorded_files_are_read_completely(
    name: str, format: str, recordings: int, rows: int | None, agents: int | None, unit: str, hz: float
) -> None:
    path = real_file(name)
    assert detect_format(path) == format
    found = read_recordings(path)
    assert len(found) == recordings
    assert {tracks.unit for tracks in found} == {unit}
    assert all(tracks.hz == pytest.approx(hz) for tracks in found)
    if rows is not None:
        assert sum(len(tracks.time) for tracks in found) == rows
    if agents is not None:
        assert sum(tracks.num_agents for tracks in found) == agents
    step = usual_step(found[0].time, found[0].agent)
    assert step == pytest.approx(1 / hz, abs=1e-6)
