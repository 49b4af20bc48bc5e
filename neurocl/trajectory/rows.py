"""What all readers share: lines of a text of any size, numbers with their line, and rows put together to a TrackSet.

``M`` rows. Nothing here knows a format.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.trajectory.scenes import TrackSet

MAX_BYTES = 1 << 30  # of one file, unpacked
MAX_ROWS = 10_000_000  # of one file, about 0.5 GB in memory
MAX_LINE = 1 << 16  # bytes of one line of a text
MAX_FRAME = 1e15
BLOCK_LINES = 20_000


def mistake(path: Path, line: int, text: str) -> UserError:
    """The error for one line of a file."""
    return UserError(f"{path}:{line}: {text}")


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if it is gzip.

    Raises:
        UserError: no such file, a folder, or no right to read it.
    """
    try:
        stream = path.open("rb")
        magic = stream.read(2)
        stream.seek(0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return io.BufferedReader(gzip.GzipFile(fileobj=stream)) if magic == b"\x1f\x8b" else stream


def head(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a file, unpacked.

    Raises:
        UserError: unreadable, empty, or a damaged gzip.
    """
    with opened(path) as stream:
        try:
            start = stream.read(size)
        except (EOFError, zlib.error, OSError) as error:
            raise mistake(path, 1, f"the gzip file is damaged ({error})") from error
    if not start.strip():
        raise mistake(path, 1, "the file is empty")
    return start


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank, one by one.

    Raises:
        UserError: a file or line over the limits, bytes that are not UTF-8 text, a damaged gzip.
    """
    with opened(path) as stream:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise mistake(path, 1, f"the file has {size / 2**30:.1f} GiB, {_limit()}")
        total = number = 0
        while True:
            number += 1
            try:
                raw = stream.readline(MAX_LINE + 1)
            except (EOFError, zlib.error, OSError) as error:
                raise mistake(path, number, f"the gzip file is damaged ({error})") from error
            if not raw:
                return
            total += len(raw)
            if len(raw) > MAX_LINE:
                raise mistake(path, number, f"a line of more than {MAX_LINE} bytes; this is not a table of tracks")
            if total > MAX_BYTES:
                raise mistake(path, number, f"the text goes on beyond here, {_limit()}")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise mistake(path, number, "bytes that are not UTF-8 text") from error
            if "\0" in text:
                raise mistake(path, number, "a zero byte; this is not a text file")
            text = text.strip("\r\n")
            if text and not text.isspace():
                yield number, text


def _limit() -> str:
    return f"at most {MAX_BYTES / 2**30:.1f} GiB are read; cut it into several files"


def number_blocks(path: Path, columns: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Line numbers [n] and values [n, columns] of a table of numbers without a header, some thousand lines at a time.

    Columns may be separated by spaces, tabs or commas.

    Raises:
        UserError: another number of columns, text where a number belongs, NaN or an infinite value.
    """
    source = text_lines(path)
    while block := list(islice(source, BLOCK_LINES)):
        numbers = np.array([number for number, _ in block], dtype=np.int64)
        texts = [text.replace(",", " ") for _, text in block]
        try:
            values = np.loadtxt(texts, dtype=np.float64, comments=None, ndmin=2)
        except ValueError:
            values = np.empty((0, 0))
        if values.shape != (len(block), columns) or not np.isfinite(values).all():
            # Slower, but this way names the first bad line.
            values = np.array(
                [_numbers(path, number, text.split(), columns) for number, text in zip(numbers, texts, strict=True)]
            )
        yield numbers, values


def _numbers(path: Path, line: int, cells: Sequence[str], columns: int) -> list[float]:
    if len(cells) != columns:
        raise mistake(path, line, f"{len(cells)} columns where {columns} belong")
    return [number_in(path, line, cell) for cell in cells]


def number_in(path: Path, line: int, text: object, what: str = "a number") -> float:
    """``text`` as a finite number.

    Raises:
        UserError: it is something else.
    """
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise mistake(path, line, f"{_shown(text)} where {what} belongs") from error
    if not math.isfinite(value):
        raise mistake(path, line, f"{_shown(text)} where {what} belongs")
    return value


def whole_in(path: Path, line: int, text: object, what: str = "a whole number") -> int:
    """``text`` as a whole number.

    Raises:
        UserError: it is something else.
    """
    value = number_in(path, line, text, what)
    if value != int(value) or abs(value) >= 2**62:
        raise mistake(path, line, f"{_shown(text)} where {what} belongs")
    return int(value)


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def agent_label(text: str) -> str:
    """One name for ``1``, ``1.0`` and ``1e0``; other names stay."""
    text = text.strip()
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if math.isfinite(value) and value == int(value) else text


@dataclass
class Rows:
    """The rows of one recording while its file is being read.

    Attributes:
        path: the file, for messages.
        name: of the recording.
    """

    path: Path
    name: str
    _frame: array[float] = field(default_factory=lambda: array("d"))
    _time: array[float] = field(default_factory=lambda: array("d"))
    _agent: array[int] = field(default_factory=lambda: array("q"))
    _x: array[float] = field(default_factory=lambda: array("d"))
    _y: array[float] = field(default_factory=lambda: array("d"))
    _line: array[int] = field(default_factory=lambda: array("q"))
    _names: dict[str, int] = field(default_factory=dict)
    _kinds: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._agent)

    def add(
        self,
        line: int,
        agent: str,
        x: float,
        y: float,
        kind: str = "pedestrian",
        *,
        frame: float | None = None,
        time: float | None = None,
    ) -> None:
        """One row with its frame number, its time in seconds, or both: the same for all rows of a recording."""
        index = self._names.get(agent)
        if index is None:
            index = self._names[agent] = len(self._names)
            self._kinds.append(kind)
        if frame is not None:
            self._frame.append(frame)
        if time is not None:
            self._time.append(time)
        self._agent.append(index)
        self._x.append(x)
        self._y.append(y)
        self._line.append(line)

    def finished(
        self,
        *,
        unit: str,
        hz: float | None = None,
        frames_per_second: float | None = None,
        drop_repeats: bool = False,
    ) -> TrackSet:
        """The recording, see :func:`assembled`."""
        return assembled(
            self.path,
            self.name,
            frame=np.frombuffer(self._frame) if len(self._frame) else None,
            time=np.frombuffer(self._time) if len(self._time) else None,
            agent=np.frombuffer(self._agent, dtype=np.int64),
            xy=np.stack([np.frombuffer(self._x), np.frombuffer(self._y)], axis=1),
            line=np.frombuffer(self._line, dtype=np.int64),
            agent_names=tuple(self._names),
            kind=tuple(self._kinds),
            unit=unit,
            hz=hz,
            frames_per_second=frames_per_second,
            drop_repeats=drop_repeats,
        )


class RowGroups:
    """Rows of a file with several recordings, kept apart by name, in order of appearance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.groups: dict[str, Rows] = {}
        self.num_rows = 0

    def of(self, name: str, line: int) -> Rows:
        """The rows of ``name``, about to get one more.

        Raises:
            UserError: the file has more rows than are read.
        """
        self.num_rows += 1
        if self.num_rows > MAX_ROWS:
            raise too_many_rows(self.path, line)
        rows = self.groups.get(name)
        if rows is None:
            rows = self.groups[name] = Rows(self.path, name)
        return rows

    def finished(self, finish: Callable[[Rows], TrackSet]) -> list[TrackSet]:
        """Every recording.

        Raises:
            UserError: there was no row at all.
        """
        if not self.groups:
            raise mistake(self.path, 1, "no rows of tracks in the file")
        return [finish(rows) for rows in self.groups.values()]


def too_many_rows(path: Path, line: int) -> UserError:
    """The error for a file that is too long."""
    return mistake(path, line, f"more than {MAX_ROWS} rows; cut the file into several")


def assembled(
    path: Path,
    name: str,
    *,
    frame: NDArray[np.float64] | None,
    agent: NDArray[np.int64],
    xy: NDArray[np.float64],
    line: NDArray[np.int64],
    agent_names: tuple[str, ...],
    kind: tuple[str, ...],
    unit: str,
    time: NDArray[np.float64] | None = None,
    hz: float | None = None,
    frames_per_second: float | None = None,
    drop_repeats: bool = False,
) -> TrackSet:
    """Sort the rows of a recording, check them, and give them times.

    Args:
        path: the file, for messages.
        name: of the recording.
        frame: frame number of each row [M]; without it, frames are counted from the times.
        agent: index into ``agent_names`` [M].
        xy: positions [M, 2].
        line: line of the file [M], for messages.
        agent_names: of the agents.
        kind: of the agents.
        unit: of the positions.
        time: seconds [M]; without it, times come from the frames and their rate.
        hz: rows of one agent per second. Without ``frames_per_second`` it says how long the usual step is.
        frames_per_second: of the frame numbers.
        drop_repeats: rows of an agent that say the same of a frame count once; by default they are a mistake.

    Raises:
        UserError: two rows of an agent in one frame, no row at all, frame numbers out of range.
    """
    if not len(agent):
        raise mistake(path, 1, f"no rows of tracks in {name}")
    if time is not None:
        clock, spoken = time, "time"
    else:
        assert frame is not None
        clock, spoken = frame, "frame"
    order = np.lexsort((line, agent, clock))
    clock, agent, xy, line = clock[order], agent[order], xy[order], line[order]
    number = None if frame is None else frame[order]
    repeated = (np.diff(clock) == 0) & (np.diff(agent) == 0)
    if repeated.any():
        wrong = repeated & (np.diff(xy, axis=0) != 0).any(axis=1) if drop_repeats else repeated
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0]) + 1
            who = agent_names[agent[row]]
            again = f"agent {who} has a second row at {spoken} {clock[row]:.15g}"
            raise mistake(path, int(line[row]), f"{again}, the first is in line {line[row - 1]}")
        kept = np.concatenate([[True], ~repeated])
        clock, agent, xy, line = clock[kept], agent[kept], xy[kept], line[kept]
        number = None if number is None else number[kept]
    # Beyond this, sums of frame numbers would no longer be exact.
    far = np.flatnonzero(np.abs(clock) > MAX_FRAME)
    if len(far):
        raise mistake(path, int(line[far[0]]), f"{spoken} {clock[far[0]]:g} is out of range")
    step = usual_step(clock, agent)
    if time is not None:
        rate = hz or 1 / step
        seconds = clock
        number = np.round(clock * rate) if number is None else number
    else:
        per_second = frames_per_second or (hz or 1.0) * step
        rate = hz or per_second / step
        seconds, number = clock / per_second, clock
    return TrackSet(
        name=name,
        time=seconds,
        agent=agent,
        xy=xy,
        agent_names=agent_names,
        kind=kind,
        unit=unit,
        hz=float(rate),
        frame=number.astype(np.int64),
    )


def usual_step(frame: NDArray[np.float64] | NDArray[np.int64], agent: NDArray[np.int64]) -> float:
    """The most common distance between rows of an agent that follow each other; 1 if no agent has two rows."""
    order = np.lexsort((frame, agent))
    steps = np.diff(frame[order])[np.diff(agent[order]) == 0]
    steps = steps if len(steps) else np.diff(np.unique(frame))
    if not len(steps):
        return 1.0
    values, counts = np.unique(np.round(steps, 6), return_counts=True)
    return float(values[counts.argmax()])
