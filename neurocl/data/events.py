"""Event-camera recordings (N-MNIST): its two file forms, and frames of event counts made from them.

Letters: N recordings, T time bins, H and W the sensor's rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurocl.data.dataset import ArrayDataset, Images, Labels
from neurocl.data.npz import read_npz
from neurocl.errors import UserError

Integers = NDArray[np.integer[Any]]

NMNIST_SENSOR = (34, 34)
_BYTES_PER_EVENT = 5
_OVERFLOW_ROW = 240
_OVERFLOW_MICROSECONDS = 1 << 13
_DT_MICROSECONDS = 100
# bounds the counting buffer (8 bytes a cell) while many recordings are binned at once
_CELLS_PER_CHUNK = 1 << 23
_RECORDINGS_PER_READ = 1000


@dataclass(frozen=True)
class Recordings:
    """Events of N recordings, one after the other.

    Attributes:
        x, y: column and row, [E].
        p: polarity, [E], 1 is ON (brighter).
        t: time in microseconds, int64 [E].
        offsets: recording i is ``offsets[i] : offsets[i + 1]``, int64 [N + 1].
        labels: int64 [N].
        source: the file or folder, for messages.
    """

    x: Integers
    y: Integers
    p: Integers
    t: NDArray[np.int64]
    offsets: NDArray[np.int64]
    labels: Labels
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Recordings:
        """Recordings ``start`` to ``stop`` as views."""
        events = slice(self.offsets[start], self.offsets[stop])
        return Recordings(
            self.x[events],
            self.y[events],
            self.p[events],
            self.t[events],
            self.offsets[start : stop + 1] - self.offsets[start],
            self.labels[start:stop],
            self.source,
        )


def bin_events(
    x: Integers,
    y: Integers,
    p: Integers,
    t: Integers,
    T: int,
    shape: tuple[int, int] = NMNIST_SENSOR,
) -> Images:
    """Count the events of one recording in T equal time bins from its first to its last event.

    Args:
        x, y, p, t: columns, rows, polarities (0 or 1) and times of E events, integers [E].
        shape: rows and columns of the sensor.
    Returns: uint8 [T, 2, H, W], channel 1 is ON; counts are clipped at 255.
    Raises:
        UserError: T below 1 or an event outside the sensor.
    """
    one = Recordings(x, y, p, t.astype(np.int64), np.array([0, len(t)]), np.zeros(1, dtype=np.int64), "recording")
    frames: Images = bin_recordings(one, T, shape)[0]
    return frames


def bin_recordings(recordings: Recordings, T: int, shape: tuple[int, int] = NMNIST_SENSOR) -> Images:
    """``bin_events`` for all recordings at once.

    With t0 and t1 the first and last time of a recording, an event at t falls in bin
    ``(t - t0) * T // (t1 - t0 + 1)``. A recording without events gives frames of zeros.

    Returns: uint8 [N, T, 2, H, W].
    Raises:
        UserError: T below 1 or an event outside the sensor.
    """
    if T < 1:
        raise UserError(f"timesteps must be at least 1, got {T}")
    H, W = shape
    _check_events(recordings, H, W)
    frames = np.empty((len(recordings), T, 2, H, W), dtype=np.uint8)
    cells = T * 2 * H * W
    step = max(1, _CELLS_PER_CHUNK // cells)
    for start in range(0, len(recordings), step):
        stop = min(start + step, len(recordings))
        part = recordings.part(start, stop)
        index = _time_bins(part, T)
        index += np.repeat(np.arange(len(part)) * T, np.diff(part.offsets))
        index = ((index * 2 + part.p) * H + part.y) * W + part.x
        counts = np.bincount(index, minlength=len(part) * cells)
        frames[start:stop] = np.minimum(counts, 255).reshape(len(part), T, 2, H, W)
    return frames


def read_nmnist_npz(path: Path, split: str) -> Recordings:
    """Read one split of the packed npz form.

    ``{split}_xp`` holds x in the low six bits and the polarity in bit six, ``{split}_dt`` the time since
    the previous event of the recording in steps of 100 microseconds.

    Raises:
        UserError: missing or damaged arrays, or arrays that do not fit together.
    """
    names = {key: f"{split}_{key}" for key in ("xp", "y", "dt", "offsets", "labels")}
    arrays = read_npz(path, names.values())
    xp, y, dt = (arrays[names[key]] for key in ("xp", "y", "dt"))
    if xp.dtype != np.uint8 or y.dtype != np.uint8 or dt.dtype.kind != "u":
        raise UserError(f"{path}: {split} events must be unsigned (xp and y uint8, dt uint16)")
    offsets = arrays[names["offsets"]].astype(np.int64)
    labels = arrays[names["labels"]].astype(np.int64)
    if not len(xp) == len(y) == len(dt):
        raise UserError(f"{path}: {split}_xp, _y and _dt differ in length: {len(xp)}, {len(y)}, {len(dt)}")
    if len(offsets) != len(labels) + 1 or offsets[0] != 0 or offsets[-1] != len(xp):
        raise UserError(f"{path}: {split}_offsets do not cut {len(xp)} events into {len(labels)} recordings")
    if (np.diff(offsets) < 0).any():
        raise UserError(f"{path}: {split}_offsets must not fall")
    total = np.concatenate([[0], np.cumsum(dt, dtype=np.int64)])
    t = (total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets))) * _DT_MICROSECONDS
    return Recordings(xp & 63, y, xp >> 6, t, offsets, labels, str(path))


def read_event_file(path: Path) -> tuple[Integers, Integers, Integers, NDArray[np.int64]]:
    """Read one 40-bit ``.bin`` recording.

    An event is x, y, then one bit polarity and 23 bits time in microseconds, big-endian. A row of 240
    is no event: it says that the camera's clock passed another 8,192 microseconds.

    Returns: x, y, p and t of the events, [E].
    Raises:
        UserError: missing file or a size that is no whole number of events.
    Reference: Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using
        saccades", 2015, and the format note that comes with the data.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(data) % _BYTES_PER_EVENT:
        raise UserError(f"{path}: {len(data)} bytes is not a whole number of 5-byte events; truncated?")
    events = np.frombuffer(data, dtype=np.uint8).reshape(-1, _BYTES_PER_EVENT)
    x, y, third = events[:, 0], events[:, 1], events[:, 2]
    t = (third & 127).astype(np.int64) << 16 | events[:, 3].astype(np.int64) << 8 | events[:, 4]
    overflow = y == _OVERFLOW_ROW
    t += np.cumsum(overflow) * _OVERFLOW_MICROSECONDS
    real = ~overflow
    return x[real], y[real], third[real] >> 7, t[real]


def event_files(folder: Path) -> list[tuple[Path, int]]:
    """The recordings of ``Train`` or ``Test`` with their labels (the folder names), in order.

    Raises:
        UserError: no recordings, or a folder whose name is no label.
    """
    files: list[tuple[Path, int]] = []
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not (label.name.isascii() and label.name.isdigit()):
            raise UserError(f"{label}: the folder name must be a label, such as 0")
        files.extend((path, int(label.name)) for path in sorted(label.glob("*.bin")))
    if not files:
        raise UserError(f"{folder}: no recordings (LABEL/*.bin) there")
    return files


def read_nmnist(path: Path, T: int) -> ArrayDataset:
    """Read N-MNIST as frames of T time bins.

    Args:
        path: the packed npz, or a folder that holds ``Train/0/00001.bin`` and so on, and ``Test``.
    Returns: event frames [N, T, 2, 34, 34].
    Raises:
        UserError: missing or damaged files, T below 1.
    """
    if path.is_dir():
        train, test = (_read_folder_frames(path / split, T) for split in ("Train", "Test"))
    else:
        train, test = (_read_npz_frames(path, split, T) for split in ("train", "test"))
    return ArrayDataset("nmnist", *train, *test, tuple(str(digit) for digit in range(10)))


def _read_npz_frames(path: Path, split: str, T: int) -> tuple[Images, Labels]:
    recordings = read_nmnist_npz(path, split)
    return bin_recordings(recordings, T), recordings.labels


def _read_folder_frames(folder: Path, T: int) -> tuple[Images, Labels]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = event_files(folder)
    frames = np.empty((len(files), T if T > 0 else 0, 2, *NMNIST_SENSOR), dtype=np.uint8)
    start = 0
    for recordings in _read_in_groups(files, str(folder)):
        frames[start : start + len(recordings)] = bin_recordings(recordings, T)
        start += len(recordings)
    return frames, np.array([label for _, label in files], dtype=np.int64)


def _read_in_groups(files: list[tuple[Path, int]], source: str) -> Iterator[Recordings]:
    # the events of all 60,000 recordings need more memory than their frames
    for start in range(0, len(files), _RECORDINGS_PER_READ):
        group = files[start : start + _RECORDINGS_PER_READ]
        events = [read_event_file(path) for path, _ in group]
        x, y, p, t = (np.concatenate([event[axis] for event in events]) for axis in range(4))
        offsets = np.concatenate([[0], np.cumsum([len(event[0]) for event in events])])
        yield Recordings(x, y, p, t, offsets, np.array([label for _, label in group], dtype=np.int64), source)


def _check_events(recordings: Recordings, H: int, W: int) -> None:
    wrong = np.zeros(len(recordings.x), dtype=bool)
    for values, size in ((recordings.x, W), (recordings.y, H), (recordings.p, 2)):
        wrong |= (values < 0) | (values >= size)
    if wrong.any():
        event = int(wrong.argmax())
        number = int(np.searchsorted(recordings.offsets, event, side="right")) - 1
        raise UserError(
            f"{recordings.source}: recording {number} has an event at x={recordings.x[event]}, "
            f"y={recordings.y[event]}, p={recordings.p[event]}, outside the {W} x {H} sensor"
        )


def _time_bins(part: Recordings, T: int) -> NDArray[np.int64]:
    lengths = np.diff(part.offsets)
    filled = lengths > 0
    if not filled.any():
        return np.zeros(0, dtype=np.int64)
    starts = part.offsets[:-1][filled]
    first = np.minimum.reduceat(part.t, starts)
    span = np.maximum.reduceat(part.t, starts) - first + 1
    counts = lengths[filled]
    bins: NDArray[np.int64] = (part.t - np.repeat(first, counts)) * T // np.repeat(span, counts)
    return bins
