"""Event recordings: both file forms give the same events, and binning loses none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurocl.data.events import (
    Recordings,
    bin_events,
    bin_recordings,
    read_event_file,
    read_nmnist,
    read_nmnist_npz,
)
from neurocl.errors import UserError

Events = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def some_events(count: int, seed: int = 0) -> Events:
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 300_000, count))
    x, y = rng.integers(0, 34, (2, count), dtype=np.uint8)
    return x, y, rng.integers(0, 2, count, dtype=np.uint8), t


def encode(x: np.ndarray, y: np.ndarray, p: np.ndarray, t: np.ndarray) -> bytes:
    """The 40-bit layout, written event by event."""
    return b"".join(
        bytes([int(a), int(b)]) + (int(c) << 23 | int(d)).to_bytes(3) for a, b, c, d in zip(x, y, p, t, strict=True)
    )


def join(events: list[Events]) -> Recordings:
    x, y, p, t = (np.concatenate([event[axis] for event in events]) for axis in range(4))
    offsets = np.cumsum([0, *(len(event[0]) for event in events)])
    return Recordings(x, y, p, t, offsets, np.zeros(len(events), np.int64), "toy")


def loop_frames(x: Any, y: Any, p: Any, t: Any, T: int) -> np.ndarray:
    """The definition, one event at a time."""
    frames = np.zeros((T, 2, 34, 34), np.int64)
    for a, b, c, d in zip(x, y, p, t, strict=True):
        frames[(int(d) - int(t.min())) * T // (int(t.max()) - int(t.min()) + 1), c, b, a] += 1
    return np.minimum(frames, 255)


def test_a_bin_file_comes_back_event_by_event(tmp_path: Path) -> None:
    events = some_events(50)
    (tmp_path / "1.bin").write_bytes(encode(*events))
    for read, written in zip(read_event_file(tmp_path / "1.bin"), events, strict=True):
        assert np.array_equal(read, written)


def test_row_240_moves_the_clock_and_is_no_event(tmp_path: Path) -> None:
    data = encode(np.array([1, 0, 2]), np.array([3, 240, 4]), np.array([1, 0, 0]), np.array([5, 0, 7]))
    (tmp_path / "1.bin").write_bytes(data)
    x, y, p, t = read_event_file(tmp_path / "1.bin")
    assert (x.tolist(), y.tolist(), p.tolist(), t.tolist()) == ([1, 2], [3, 4], [1, 0], [5, 7 + 8192])


@pytest.mark.parametrize("T", [1, 3, 10])
def test_frames_equal_the_definition(T: int) -> None:
    events = some_events(400)
    assert np.array_equal(bin_events(*events, T), loop_frames(*events, T))


def test_all_recordings_at_once_equal_one_at_a_time_even_empty_ones() -> None:
    events = [some_events(count, seed) for seed, count in enumerate([5, 0, 300, 1, 0])]
    together = bin_recordings(join(events), 7)
    for frames, one in zip(together, events, strict=True):
        assert np.array_equal(frames, bin_events(*one, 7))


@given(st.integers(1, 300), st.integers(1, 20))
def test_no_event_is_lost(count: int, T: int) -> None:
    assert int(bin_events(*some_events(count, seed=count), T).sum()) == count


def test_the_first_event_is_in_the_first_bin_and_the_last_in_the_last() -> None:
    one = np.zeros(2, np.uint8)
    frames = bin_events(one, one, one, np.array([1000, 5000]), 4)
    assert frames[:, 0, 0, 0].tolist() == [1, 0, 0, 1]


def test_counts_stop_at_255() -> None:
    same = np.zeros(400, np.uint8)
    assert bin_events(same, same, same, np.arange(400), 1).max() == 255


@pytest.mark.parametrize(("x", "y", "p"), [(34, 0, 0), (0, 34, 0), (0, 0, 2), (-1, 0, 0)])
def test_an_event_outside_the_sensor_is_named(x: int, y: int, p: int) -> None:
    with pytest.raises(UserError, match=rf"event at x={x}, y={y}, p={p}, outside the 34 x 34 sensor"):
        bin_events(np.array([x]), np.array([y]), np.array([p]), np.array([0]), 2)


def test_zero_time_bins_are_refused() -> None:
    with pytest.raises(UserError, match="timesteps must be at least 1, got 0"):
        bin_events(*some_events(3), 0)


def write_folder(folder: Path) -> None:
    for split, seed in (("Train", 0), ("Test", 10)):
        for label in (0, 1):
            (folder / split / str(label)).mkdir(parents=True)
            data = encode(*some_events(30, seed + label))
            (folder / split / str(label) / f"{label + 1:05}.bin").write_bytes(data)


def test_the_original_folders_become_labelled_frames(tmp_path: Path) -> None:
    write_folder(tmp_path)
    dataset = read_nmnist(tmp_path, 5)
    assert dataset.train_images.shape == (2, 5, 2, 34, 34)
    assert dataset.train_labels.tolist() == [0, 1]
    assert np.array_equal(dataset.test_images[1], bin_events(*some_events(30, 11), 5))


def test_a_cut_recording_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "Train" / "1" / "00002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00002\.bin: 149 bytes is not a whole number of 5-byte events"):
        read_nmnist(tmp_path, 5)


def test_folders_that_are_no_labels_or_empty_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "Train" / "extra").mkdir()
    with pytest.raises(UserError, match="extra: the folder name must be a label"):
        read_nmnist(tmp_path, 5)
    with pytest.raises(UserError, match="Train: no such folder"):
        read_nmnist(tmp_path / "Train", 5)


def packed(events: list[Events]) -> dict[str, np.ndarray]:
    dt = np.concatenate([np.diff(event[3] // 100, prepend=0) for event in events])
    recordings = join(events)
    return {
        "train_xp": recordings.x.astype(np.uint8) | recordings.p.astype(np.uint8) << 6,
        "train_y": recordings.y,
        "train_dt": dt.astype(np.uint16),
        "train_offsets": recordings.offsets.astype(np.uint32),
        "train_labels": np.arange(len(events), dtype=np.uint8),
    }


def test_the_packed_form_gives_back_events_to_100_microseconds(tmp_path: Path) -> None:
    events = [some_events(20, 1), some_events(0), some_events(30, 2)]
    np.savez(tmp_path / "a.npz", **packed(events))
    read, written = read_nmnist_npz(tmp_path / "a.npz", "train"), join(events)
    assert np.array_equal(read.t, written.t // 100 * 100)
    for name in ("x", "y", "p", "offsets"):
        assert np.array_equal(getattr(read, name), getattr(written, name))
    assert read.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_y", np.zeros(3, np.uint8), "differ in length"),
        ("train_xp", np.zeros(50, np.int64), "must be unsigned"),
        ("train_offsets", np.array([0, 20, 20, 49]), "do not cut 50 events into 3 recordings"),
        ("train_offsets", np.array([0, 30, 20, 50]), "must not fall"),
    ],
)
def test_packed_arrays_that_do_not_fit_are_named(tmp_path: Path, key: str, value: np.ndarray, message: str) -> None:
    arrays = packed([some_events(20, 1), some_events(0), some_events(30, 2)])
    np.savez(tmp_path / "a.npz", **(arrays | {key: value}))
    with pytest.raises(UserError, match=message):
        read_nmnist_npz(tmp_path / "a.npz", "train")


def test_real_recordings_last_three_saccades(real_data: Callable[[str], Path]) -> None:
    path = real_data("nmnist-small/nmnist_small.npz")
    recordings = read_nmnist_npz(path, "train")
    assert len(recordings) == 1000
    assert recordings.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert len(recordings.t) / 1000 == pytest.approx(4133, abs=1)
    spans = recordings.t[recordings.offsets[1:] - 1] - recordings.t[recordings.offsets[:-1]]
    assert np.median(spans) / 1000 == pytest.approx(310, abs=10)
    frames = bin_recordings(recordings.part(0, 20), 10)
    assert np.array_equal(frames[3], loop_frames(*(getattr(recordings.part(3, 4), k) for k in "xypt"), 10))
