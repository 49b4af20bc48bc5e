"""Lines and numbers of texts of any size, and rows put together to a recording."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from neurocl.errors import UserError
from neurocl.trajectory import rows as rows_module
from neurocl.trajectory.rows import Rows, agent_label, assembled, head, number_blocks, text_lines, usual_step


def written(tmp_path: Path, content: bytes, name: str = "walk.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf1 2\r\n\r\n  \n3 4")
    assert list(text_lines(path)) == [(1, "1 2"), (4, "3 4")]


def test_gzip_is_told_from_the_content_not_from_the_name(tmp_path: Path) -> None:
    path = written(tmp_path, gzip.compress(b"1 2\n", mtime=0))
    assert list(text_lines(path)) == [(1, "1 2")]
    assert head(path) == b"1 2\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: the file is empty"),
        (b" \n\n", ":1: the file is empty"),
        (gzip.compress(b"1 2 3 4\n" * 999, mtime=0)[:40], ":1: the gzip file is damaged"),
    ],
)
def test_a_head_that_cannot_be_read_is_a_mistake_with_file_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=f"walk.txt{message}"):
        head(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 2\n\xff\xfe\x80\n", ":2: bytes that are not UTF-8 text"),
        (b"1 2\n3\x004\n", ":2: a zero byte"),
        (b"1 2\n" + b"7" * 100_000, ":2: a line of more than 65536 bytes"),
    ],
)
def test_a_line_that_is_not_text_is_a_mistake(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"walk.txt{message}"):
        list(text_lines(written(tmp_path, content)))


def test_a_file_of_two_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "walk.txt"
    with path.open("wb") as stream:
        stream.truncate(2 << 30)  # a hole, not two gigabytes on the disk
    with pytest.raises(UserError, match=r"walk.txt:1: the file has 2.0 GiB, at most 1.0 GiB are read"):
        next(text_lines(path))


def test_what_a_small_gzip_unpacks_to_is_limited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_BYTES", 100_000)
    path = written(tmp_path, gzip.compress(b"1 2 3 4\n" * 100_000, mtime=0))
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"walk.txt:12501: the text goes on beyond here"):
        list(text_lines(path))


def test_numbers_come_in_blocks_with_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_LINES", 3)
    path = written(tmp_path, b"1 2\n3,4\n\n5\t6\n7 8e0\n")
    blocks = list(number_blocks(path, 2))
    assert [lines.tolist() for lines, _ in blocks] == [[1, 2, 4], [5]]
    assert np.concatenate([values for _, values in blocks]).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("1 2 3", "3 columns where 2 belong"),
        ("1 two", "'two' where a number belongs"),
        ("1 nan", "'nan' where a number belongs"),
        ("1 inf", "'inf' where a number belongs"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path: Path, bad: str, message: str) -> None:
    path = written(tmp_path, f"1 2\n\n3 4\n{bad}\n9 nan\n".encode())
    with pytest.raises(UserError, match=f"walk.txt:4: {message}"):
        list(number_blocks(path, 2))


def test_one_agent_has_one_name() -> None:
    assert [agent_label(text) for text in ("1", "1.0", " 1e0 ", "1.5", "a1", "nan")] == [
        "1",
        "1",
        "1",
        "1.5",
        "a1",
        "nan",
    ]


def test_rows_are_sorted_and_timed_by_their_frames(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "walk.txt", "walk")
    for line, (frame, agent) in enumerate([(20, "b"), (0, "a"), (10, "b"), (10, "a")]):
        rows.add(line + 1, agent, frame, line, frame=frame)
    tracks = rows.finished(unit="m", hz=2.5)
    assert tracks.frame.tolist() == [0, 10, 10, 20]
    assert tracks.time.tolist() == [0.0, 0.4, 0.4, 0.8]
    assert [tracks.agent_names[agent] for agent in tracks.agent] == ["a", "b", "a", "b"]


def test_a_second_row_of_an_agent_in_a_frame_is_a_mistake(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "walk.txt", "walk")
    for line, frame in ((3, 780), (7, 790), (12, 780)):
        rows.add(line, "4", 0, 0, frame=frame)
    message = r"walk.txt:12: agent 4 has a second row at frame 780, the first is in line 3"
    with pytest.raises(UserError, match=message):
        rows.finished(unit="m")


def test_rows_that_say_the_same_twice_may_be_allowed_others_not(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "walk.txt", "walk")
    for line, x in ((1, 5.0), (2, 5.0)):
        rows.add(line, "4", x, 0, frame=1)
    assert len(rows.finished(unit="m", drop_repeats=True).time) == 1
    rows.add(3, "4", 6.0, 0, frame=1)
    with pytest.raises(UserError, match=r"walk.txt:3: agent 4 has a second row"):
        rows.finished(unit="m", drop_repeats=True)


def test_times_in_seconds_give_the_rate(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "walk.txt", "walk")
    for line, time in enumerate((0.0, 0.5, 1.0, 2.0)):
        rows.add(line + 1, "a", 0, 0, time=time)
    tracks = rows.finished(unit="m")
    assert tracks.hz == 2.0
    assert tracks.frame.tolist() == [0, 1, 2, 4]


def test_no_rows_are_a_mistake(tmp_path: Path) -> None:
    empty = np.empty(0)
    none = np.empty(0, dtype=np.int64)
    with pytest.raises(UserError, match="no rows of tracks"):
        assembled(
            tmp_path / "walk.txt",
            "walk",
            frame=empty,
            agent=none,
            xy=np.empty((0, 2)),
            line=none,
            agent_names=(),
            kind=(),
            unit="m",
        )


def test_the_usual_step_is_the_most_common_one() -> None:
    assert usual_step(np.array([0, 10, 20, 60, 3, 13]), np.array([0, 0, 0, 0, 1, 1])) == 10
    assert usual_step(np.array([5, 5]), np.array([0, 1])) == 1
