"""Cutting recordings into windows of observed and predicted steps, for all windows at once.

``S`` scenes, ``A`` agents, ``T = T_o + T_p`` steps, ``M`` rows, ``R`` recordings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.trajectory.resample import on_common_grid, to_rate
from neurocl.trajectory.scenes import KINDS, Scenes, TrackSet

KIND_INDEX = {kind: index for index, kind in enumerate(KINDS)}
MAX_CELLS = 200_000_000  # positions in the dense result
CHUNK_ENTRIES = 20_000_000  # rows looked at together, a row counts in every window that holds it


def cut(
    tracks: TrackSet | Sequence[TrackSet],
    num_observed: int,
    num_predicted: int,
    *,
    stride: int = 1,
    hz: float | None = None,
    partial: bool = True,
    min_targets: int = 1,
    name: str | None = None,
) -> Scenes:
    """Windows that slide over the times of each recording.

    The steps of a recording are its distinct times. A window is T of them in a row without a gap; every ``stride``-th
    one is taken. Agents with a row in all T steps are targets. Targets come first in a scene, then by agent number.

    Args:
        tracks: one recording or several of the same unit and rate.
        num_observed: T_o.
        num_predicted: T_p.
        stride: steps from one window to the next.
        hz: resample to this rate first. Recordings whose agents are not seen at common times are resampled to their own
            rate in any case.
        partial: keep agents that were seen during the observed steps but are not complete, as neighbours with masks.
        min_targets: windows with fewer complete agents are left out.
        name: of the data set; the name of the recording.

    Raises:
        UserError: steps or stride below 1, recordings that differ in unit or rate, a result that is far too large.
    """
    recordings = [tracks] if isinstance(tracks, TrackSet) else list(tracks)
    if not recordings:
        raise UserError("no recordings to cut")
    for value, what in ((num_observed, "num_observed"), (num_predicted, "num_predicted"), (stride, "stride")):
        if value < 1:
            raise UserError(f"{what} must be at least 1, got {value}")
    recordings = [aligned(recording, hz) for recording in recordings]
    rows = _concatenated(recordings)
    length = num_observed + num_predicted
    first = _window_starts(rows, length, stride)
    per_window = max(1.0, len(rows.step) / max(1, len(rows.even)) * length)
    size = max(1, int(CHUNK_ENTRIES / per_window))
    parts: list[Scenes] = []
    cells = 0
    for begin in range(0, max(1, len(first)), size):
        some = first[begin : begin + size]
        part = _scenes(recordings, rows, some, num_observed, num_predicted, partial, min_targets, name)
        cells += len(part) * part.num_agents * length
        if cells > MAX_CELLS:
            raise UserError(f"{part.name}: the windows hold more than {MAX_CELLS} positions; use a larger stride")
        parts.append(part)
    return parts[0] if len(parts) == 1 else Scenes.joined(parts)


def aligned(tracks: TrackSet, hz: float | None = None) -> TrackSet:
    """The recording with all agents at common times: as it is if they are, else resampled (to ``hz`` if given)."""
    wanted = tracks.hz if hz is None else hz
    if abs(wanted - tracks.hz) < 1e-6 * tracks.hz and on_common_grid(tracks):
        return tracks
    return to_rate(tracks, wanted)


@dataclass(frozen=True)
class _Rows:
    """Rows of all recordings: step of each, counted through all recordings, agent likewise, position."""

    step: NDArray[np.int64]
    agent: NDArray[np.int64]
    xy: NDArray[np.float64]
    frame_of_step: NDArray[np.int64]
    recording_of_step: NDArray[np.int64]
    even: NDArray[np.bool_]  # whether a step follows the one before it in the same recording without a gap
    first_agent: NDArray[np.int64]  # per recording


def _concatenated(recordings: Sequence[TrackSet]) -> _Rows:
    steps, agents, frames, owners, evens, firsts = [], [], [], [], [], []
    num_steps = num_agents = 0
    for index, tracks in enumerate(recordings):
        times, row, step = np.unique(tracks.time, return_index=True, return_inverse=True)
        steps.append(step + num_steps)
        agents.append(tracks.agent + num_agents)
        frames.append(tracks.frame[row])
        owners.append(np.full(len(times), index))
        gaps = np.diff(times) * tracks.hz
        evens.append(np.concatenate([[False], (gaps > 0.5) & (gaps < 1.5)])[: len(times)])
        firsts.append(num_agents)
        num_steps += len(times)
        num_agents += tracks.num_agents
    return _Rows(
        step=np.concatenate(steps).astype(np.int64),
        agent=np.concatenate(agents),
        xy=np.concatenate([tracks.xy for tracks in recordings]),
        frame_of_step=np.concatenate(frames),
        recording_of_step=np.concatenate(owners).astype(np.int64),
        even=np.concatenate(evens).astype(np.bool_),
        first_agent=np.array(firsts, dtype=np.int64),
    )


def _window_starts(rows: _Rows, length: int, stride: int) -> NDArray[np.int64]:
    """First steps of the windows: every ``stride``-th step of a recording that ``length - 1`` even steps follow."""
    steps = len(rows.even)
    if steps < length:
        return np.empty(0, dtype=np.int64)
    breaks = np.cumsum(~rows.even)
    first = np.arange(steps - length + 1)
    unbroken = breaks[first + length - 1] == breaks[first]
    _, begin = np.unique(rows.recording_of_step, return_index=True)
    local = first - begin[rows.recording_of_step[first]]
    starts: NDArray[np.int64] = first[unbroken & (local % stride == 0)]
    return starts


def _scenes(
    recordings: Sequence[TrackSet],
    rows: _Rows,
    first: NDArray[np.int64],
    num_observed: int,
    num_predicted: int,
    partial: bool,
    min_targets: int,
    name: str | None,
) -> Scenes:
    """Dense scenes from windows that start at the steps ``first``."""
    length = num_observed + num_predicted
    # Rows are sorted by step, so those of some windows lie together.
    zero, end = (int(first[0]), int(first[-1]) + length) if len(first) else (0, 0)
    own = slice(*np.searchsorted(rows.step, [zero, end]))
    step, agent, xy = rows.step[own] - zero, rows.agent[own], rows.xy[own]
    window_at = np.full(end - zero + 1, -1, dtype=np.int64)
    window_at[first - zero] = np.arange(len(first))
    num_agents = int(agent.max(initial=0)) + 1
    # One entry for every row in every window that holds it.
    windows, offsets, sources = [], [], []
    for offset in range(length):
        at = step - offset
        found = np.where(at >= 0, window_at[np.maximum(at, 0)], -1)
        held = np.flatnonzero(found >= 0)
        windows.append(found[held])
        offsets.append(np.full(len(held), offset))
        sources.append(held)
    window, place_in, source = (np.concatenate(parts).astype(np.int64) for parts in (windows, offsets, sources))
    pairs, pair = np.unique(window * num_agents + agent[source], return_inverse=True)
    complete = np.bincount(pair, minlength=len(pairs)) == length
    seen = np.bincount(pair[place_in < num_observed], minlength=len(pairs)) > 0
    pair_window, pair_agent = pairs // num_agents, pairs % num_agents
    targets = np.bincount(pair_window[complete], minlength=len(first))
    good = targets >= max(1, min_targets)
    kept = good[pair_window] & (complete | (seen & partial))
    scene_of_window = np.cumsum(good) - 1
    order = np.lexsort((pair_agent, ~complete, pair_window))
    order = order[kept[order]]
    scene = scene_of_window[pair_window[order]]
    # Place of an agent in its scene: rank among the kept pairs of the window.
    sizes = np.bincount(scene, minlength=int(good.sum()))
    slot = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    width = max(1, int(sizes.max(initial=0)))
    if len(sizes) * width * length > MAX_CELLS:
        raise UserError(f"{len(sizes)} windows of {width} agents and {length} steps are too many; use a larger stride")
    place = np.full(len(pairs), -1, dtype=np.int64)
    place[order] = scene * width + slot
    values = np.zeros((len(sizes) * width, length, 2), dtype=np.float32)
    mask = np.zeros((len(sizes) * width, length), dtype=np.bool_)
    target_cell = place[pair]
    inside = target_cell >= 0
    values[target_cell[inside], place_in[inside]] = xy[source[inside]]
    mask[target_cell[inside], place_in[inside]] = True
    cells = scene * width + slot
    first = first[good]
    owner = rows.recording_of_step[first] if len(first) else np.empty(0, dtype=np.int64)

    kinds = np.array([KIND_INDEX[kind] for tracks in recordings for kind in tracks.kind], dtype=np.int64)
    shape = (len(sizes), width)
    return Scenes(
        past=torch.from_numpy(values.reshape(*shape, length, 2)[:, :, :num_observed].copy()),
        future=torch.from_numpy(values.reshape(*shape, length, 2)[:, :, num_observed:].copy()),
        agent_mask=_filled(shape, cells, np.ones(len(cells), dtype=np.bool_), False),
        past_mask=torch.from_numpy(mask.reshape(*shape, length)[:, :, :num_observed].copy()),
        future_mask=torch.from_numpy(mask.reshape(*shape, length)[:, :, num_observed:].copy()),
        target_mask=_filled(shape, cells, complete[order], False),
        kind=_filled(shape, cells, kinds[pair_agent[order]], 0),
        agent_id=_filled(shape, cells, pair_agent[order] - rows.first_agent[owner[scene]], -1),
        start=torch.from_numpy(rows.frame_of_step[first]),
        recording=tuple(recordings[index].name for index in owner),
        unit=_same([tracks.unit for tracks in recordings], "units"),
        hz=float(_same([round(tracks.hz, 6) for tracks in recordings], "rates")),
        name=recordings[0].name if name is None else name,
    )


def _filled(shape: tuple[int, int], cells: NDArray[np.int64], values: NDArray[np.generic], empty: int) -> torch.Tensor:
    """[S, A] with ``values`` at ``cells`` and ``empty`` elsewhere."""
    table = np.full(shape[0] * shape[1], empty, dtype=values.dtype)
    table[cells] = values
    return torch.from_numpy(table.reshape(shape))


def _same(values: Sequence[Any], what: str) -> Any:
    if len(set(values)) > 1:
        shown = ", ".join(str(value) for value in sorted(set(map(str, values)))[:4])
        raise UserError(f"recordings of different {what} ({shown}) cannot be cut together")
    return values[0]


def cut_dense(
    xy: NDArray[np.float64],
    index: NDArray[np.int64],
    num_observed: int,
    *,
    kind: Sequence[str],
    start: NDArray[np.int64],
    recording: Sequence[str],
    unit: str,
    hz: float,
    name: str,
    counted: Sequence[bool] | None = None,
) -> Scenes:
    """Windows of matches, in which everybody is there all the time.

    Args:
        xy: positions [rows, A, 2].
        index: row of every step of every window [S, T].
        num_observed: T_o.
        kind: of the A agents.
        start: frame number of the first step [S].
        recording: name for each scene.
        unit: of the positions.
        hz: steps per second.
        name: of the data set.
        counted: which agents are targets; all of them by default.
    """
    scenes, length = index.shape
    agents = xy.shape[1]
    dense = torch.from_numpy(np.ascontiguousarray(xy[index].transpose(0, 2, 1, 3), dtype=np.float32))
    targets = torch.ones(agents, dtype=torch.bool) if counted is None else torch.tensor(list(counted))
    present = torch.ones(scenes, agents, dtype=torch.bool)
    return Scenes(
        past=dense[:, :, :num_observed].contiguous(),
        future=dense[:, :, num_observed:].contiguous(),
        agent_mask=present,
        past_mask=present[..., None].repeat(1, 1, num_observed),
        future_mask=present[..., None].repeat(1, 1, length - num_observed),
        target_mask=targets.repeat(scenes, 1),
        kind=torch.tensor([KIND_INDEX[value] for value in kind]).repeat(scenes, 1),
        agent_id=torch.arange(agents).repeat(scenes, 1),
        start=torch.from_numpy(np.asarray(start, dtype=np.int64)),
        recording=tuple(recording),
        unit=unit,
        hz=hz,
        name=name,
    )


def last_window(tracks: TrackSet, num_observed: int, num_predicted: int, *, hz: float | None = None) -> Scenes:
    """One scene whose last observed step is the newest time of the recording; its future is unknown.

    Agents that are there now are targets, those that have left or whose present position is not known stay as
    neighbours; who was seen only before the observed steps is not in it. Missing steps are masked.

    Args:
        tracks: a recording; the steps end at its last time.
        num_observed: T_o.
        num_predicted: T_p, for the shape of the (empty) future.
        hz: resample to this rate first.

    Raises:
        UserError: steps below 1 or a recording without rows.
    """
    for value, what in ((num_observed, "num_observed"), (num_predicted, "num_predicted")):
        if value < 1:
            raise UserError(f"{what} must be at least 1, got {value}")
    if not len(tracks.time):
        raise UserError(f"{tracks.name}: no rows")
    rate = tracks.hz if hz is None else hz
    newest = float(tracks.time[-1])
    if abs(rate - tracks.hz) >= 1e-6 * tracks.hz or not on_common_grid(tracks):
        frames, times = tracks.frame, tracks.time
        tracks = to_rate(tracks, rate, origin=newest)
        # Steps count back from now; the frame numbers of the file are wanted for the scene's start.
        per_second = (frames[-1] - frames[0]) / (times[-1] - times[0]) if times[-1] > times[0] else rate
        start = round(float(frames[-1] - (num_observed - 1) / rate * per_second))
    else:
        times, at = np.unique(tracks.time, return_index=True)
        step = np.median(np.diff(tracks.frame[at])) if len(times) > 1 else 1
        start = int(tracks.frame[-1] - (num_observed - 1) * step)
    place = np.rint((tracks.time - newest) * rate).astype(np.int64) + num_observed - 1
    held = np.flatnonzero((place >= 0) & (place < num_observed))
    present, slot = np.unique(tracks.agent[held], return_inverse=True)
    mask = np.zeros((len(present), num_observed), dtype=np.bool_)
    mask[slot, place[held]] = True
    order = np.lexsort((present, ~mask[:, -1]))
    rank = np.argsort(order)[slot]
    values = np.zeros((1, len(present), num_observed, 2), dtype=np.float32)
    values[0, rank, place[held]] = tracks.xy[held]
    known = torch.from_numpy(mask[order])[None]
    shape = (1, len(present))
    return Scenes(
        past=torch.from_numpy(values),
        future=torch.zeros(*shape, num_predicted, 2),
        agent_mask=torch.ones(shape, dtype=torch.bool),
        past_mask=known,
        future_mask=torch.zeros(*shape, num_predicted, dtype=torch.bool),
        target_mask=known[:, :, -1].clone(),
        kind=torch.tensor([[KIND_INDEX[tracks.kind[agent]] for agent in present[order]]]),
        agent_id=torch.from_numpy(present[order].astype(np.int64))[None],
        start=torch.tensor([start]),
        recording=(tracks.name,),
        unit=tracks.unit,
        hz=float(rate),
        name=tracks.name,
    )


def without_overlap(scenes: Scenes, shares: Sequence[float], span: int) -> list[torch.Tensor]:
    """Rows of ``scenes`` for parts that follow each other in time and share no step.

    The windows, ordered by recording and time, are cut by ``shares``; windows that share a step with an earlier part
    are left out of the later one.

    Args:
        scenes: as :func:`cut` orders them.
        shares: of the parts; they add up to 1.
        span: frame numbers from the first step of a window to the first step that it does not hold.
    """
    bounds = np.rint(np.cumsum([0.0, *shares]) * len(scenes)).astype(np.int64)
    parts = []
    for first, last in pairwise(bounds.tolist()):
        rows = torch.arange(first, last)
        if 0 < first < last:
            same = torch.tensor([scenes.recording[row] == scenes.recording[first - 1] for row in range(first, last)])
            rows = rows[~(same & (scenes.start[first:last] < scenes.start[first - 1] + span))]
        parts.append(rows)
    return parts
