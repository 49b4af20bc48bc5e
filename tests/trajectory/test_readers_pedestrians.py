"""What the files of walking people say, down to the position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.trajectory.readers import read_recordings, read_tracks
from tests.trajectory.real_data import real_file


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scene.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_four_columns_are_frame_agent_x_y_at_two_and_a_half_hertz(tmp_path: Path) -> None:
    tracks = read_tracks(write(tmp_path, "780 1.0 8.46 3.59\n790 1.0 9.57 3.79\n790 12.0 1 2\n"))
    assert tracks.agent_names == ("1", "12")
    assert tracks.frame.tolist() == [780, 790, 790]
    assert np.diff(tracks.time) == pytest.approx([0.4, 0.0])
    assert tracks.xy[1].tolist() == [9.57, 3.79]


def test_obsmat_has_y_in_its_fifth_column(tmp_path: Path) -> None:
    tracks = read_tracks(write(tmp_path, "780 1 8.4 0 3.5 1.6 0 0.1\n786 1 9.1 0 3.6 1.6 0 0.3\n"))
    assert tracks.xy.tolist() == [[8.4, 3.5], [9.1, 3.6]]
    assert np.diff(tracks.time) == pytest.approx([0.4])


def test_spline_points_count_from_the_middle_of_the_video(tmp_path: Path) -> None:
    text = "1 - the number of splines\n2 - Num of control points\n0 0 5 9 - (p)\n40 -20 25 9 - (p)\n"
    tracks = read_tracks(write(tmp_path, text))
    assert tracks.frame.tolist() == [10, 20]
    assert tracks.xy.tolist() == [[370.0, 293.0], [390.0, 303.0]]


def test_splines_and_homography_give_the_published_ground_positions() -> None:
    spline = read_tracks(
        real_file("eth_ucy/original/ucy_zara01_annotation.vsp.gz"),
        homography=real_file("eth_ucy/original/ucy_zara01_H.txt.gz"),
    )
    ground = read_tracks(real_file("eth_ucy/original/ucy_zara01_obsmat.txt.gz"))
    assert spline.unit == "m"
    # The published file counts frames from 1.
    assert np.array_equal(spline.frame + 1, ground.frame)
    assert np.abs(spline.xy - ground.xy).max() < 1e-4


def test_drone_boxes_become_centres_and_lost_rows_go(tmp_path: Path) -> None:
    text = '3 10 20 30 60 0 0 0 0 "Biker"\n3 12 20 32 60 1 1 0 1 "Biker"\n4 0 0 2 2 0 0 0 1 "Cart"\n'
    tracks = read_tracks(write(tmp_path, text))
    assert tracks.xy.tolist() == [[20, 40], [1, 1]]
    assert tracks.kind == ("cyclist", "vehicle")


def test_trajnet_scenes_are_recordings_named_by_split_and_scene(tmp_path: Path) -> None:
    text = "split,scene,track,frame,x_px,y_px\ntest,a_1,7,0,1,2\ntest,a_1,7,12,2,2\ntrain,b_0,7,0,5,5\n"
    found = read_recordings(write(tmp_path, text))
    assert [tracks.name for tracks in found] == ["test/a_1", "train/b_0"]
    assert found[0].time.tolist() == [0.0, 0.4]


NDJSON = """{"scene": {"id": 5, "p": 2, "s": 10, "e": 20, "fps": 2.5, "tag": 0}}
{"scene": {"id": 6, "p": 1, "s": 0, "e": 10, "fps": 2.5, "tag": 0}}
{"track": {"f": 0, "p": 1, "x": 0.0, "y": 1.0}}
{"track": {"f": 10, "p": 1, "x": 0.5, "y": 1.0}}
{"track": {"f": 10, "p": 2, "x": 9.0, "y": 1.0}}
{"track": {"f": 20, "p": 2, "x": 9.5, "y": 1.0}}
{"track": {"f": 30, "p": 2, "x": 1.0, "y": 1.0, "prediction_number": 0, "scene_id": 5}}
"""


def test_trajnetpp_scenes_are_recordings_with_the_primary_agent_first(tmp_path: Path) -> None:
    found = read_recordings(write(tmp_path, NDJSON))
    assert [tracks.name for tracks in found] == ["scene:5", "scene:6"]
    assert found[0].agent_names == ("2", "1")
    assert found[0].frame.tolist() == [10, 10, 20]
    assert found[0].xy[0].tolist() == [9.0, 1.0]
    assert found[1].agent_names == ("1", "2")


def test_a_trajnetpp_file_read_as_one_recording_has_every_track_once(tmp_path: Path) -> None:
    tracks = read_tracks(write(tmp_path, NDJSON))
    assert tracks.frame.tolist() == [0, 10, 10, 20]
    assert read_tracks(write(tmp_path, NDJSON), recording="6").name == "scene:6"


@pytest.mark.parametrize(
    ("scene", "what"),
    [
        ('{"scene": {"id": 7, "p": 9, "s": 0, "e": 10}}', "the primary agent 9 of scene 7 has no row"),
        ('{"scene": {"id": 7, "p": 1, "s": 90, "e": 99}}', "no rows in the frames 90 to 99 of scene 7"),
        ('{"scene": {"id": 7, "p": 1, "s": 0}}', "a scene without 'e'"),
        ('{"other": 1}', "neither a scene nor a track"),
    ],
)
def test_scenes_that_do_not_fit_the_tracks_are_mistakes(tmp_path: Path, scene: str, what: str) -> None:
    with pytest.raises(UserError, match=f"scene.txt:8: {what}"):
        read_recordings(write(tmp_path, NDJSON + scene + "\n"))


def test_recorded_trajnetpp_scenes_have_their_primary_agent_in_all_21_frames() -> None:
    for tracks in read_recordings(real_file("trajnetpp/biwi_hotel.ndjson.gz")):
        assert (tracks.agent == 0).sum() == 21
        assert tracks.frame[-1] - tracks.frame[0] == 200
