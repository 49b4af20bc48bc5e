"""Tracks at another rate, in another unit, seen from above, or turned so that the offence plays to the right.

``M`` rows, ``A`` agents, ``T`` steps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.trajectory.rows import number_blocks
from neurocl.trajectory.scenes import TrackSet

Method = Literal["linear", "cubic"]

# Metres per unit; the foot is that of the basketball court, 28 m long and 94 ft, as the NBA protocol has it.
METRES = {"m": 1.0, "ft": 28.0 / 94.0, "yd": 0.9144}
MAX_GAP_SECONDS = 0.5
MAX_STEPS = 1e8
FIELD_YARDS = (120.0, 160.0 / 3.0)


def to_rate(
    tracks: TrackSet, hz: float, *, method: Method = "linear", max_gap: float | None = None, origin: float | None = None
) -> TrackSet:
    """Every agent at the times ``origin + k / hz``, between its first and its last row.

    Frames of the result count the steps. An agent without two rows has none of the new times but the one it was seen
    at, if any.

    Args:
        tracks: irregular or regular rows.
        hz: wanted rows per second.
        method: straight lines between rows, or cubic Hermite curves with the slopes of parabolas through three rows.
        max_gap: longest time without a row that is filled, in seconds; half a second, or 1.5 rows if that is longer.
        origin: time of step 0; the first row.

    Raises:
        UserError: a rate that is not positive, or far too many steps.
    """
    if not (hz > 0 and math.isfinite(hz)):
        raise UserError(f"hz must be above 0, got {hz}")
    if not len(tracks.time):
        return replace(tracks, hz=float(hz))
    longest = max(MAX_GAP_SECONDS, 1.5 / tracks.hz) if max_gap is None else max_gap
    zero = float(tracks.time[0]) if origin is None else origin
    order = np.lexsort((tracks.time, tracks.agent))
    time, xy = tracks.time[order], tracks.xy[order]
    bounds = np.searchsorted(tracks.agent[order], np.arange(tracks.num_agents + 1))
    present = bounds[1:] > bounds[:-1]
    span = time[bounds[1:][present] - 1] - time[bounds[:-1][present]]
    if span.sum() * hz > MAX_STEPS:
        raise UserError(f"{tracks.name}: {hz:g} rows per second would make more than a hundred million rows")
    slack = 1e-6 / hz
    steps, agents, places = [], [], []
    for agent, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first == last:
            continue
        own = time[first:last]
        start, stop = math.ceil((own[0] - zero - slack) * hz), math.floor((own[-1] - zero + slack) * hz)
        step = np.arange(start, stop + 1)
        at = np.clip(step / hz + zero, own[0], own[-1])
        left, share, width = _between(own, at)
        filled = (width <= longest + slack) | (share <= slack) | (share >= 1 - slack)
        steps.append(step[filled])
        agents.append(np.full(int(filled.sum()), agent))
        places.append(_interpolated(own, xy[first:last], left[filled], share[filled], width[filled], method))
    all_steps = np.concatenate(steps).astype(np.int64)
    all_agents = np.concatenate(agents).astype(np.int64)
    sorting = np.lexsort((all_agents, all_steps))
    return replace(
        tracks,
        time=all_steps[sorting] / hz + zero,
        agent=all_agents[sorting],
        xy=np.concatenate(places)[sorting],
        hz=float(hz),
        frame=all_steps[sorting],
    )


def _between(
    time: NDArray[np.float64], at: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The row before each of the times ``at``, how far it is to the next one from 0 to 1, and their distance."""
    left = np.clip(np.searchsorted(time, at, side="right") - 1, 0, max(0, len(time) - 2)).astype(np.int64)
    if len(time) < 2:
        return left, np.zeros(len(at)), np.zeros(len(at))
    width = time[left + 1] - time[left]
    return left, (at - time[left]) / width, width


def _interpolated(
    time: NDArray[np.float64],
    xy: NDArray[np.float64],
    left: NDArray[np.int64],
    share: NDArray[np.float64],
    width: NDArray[np.float64],
    method: Method,
) -> NDArray[np.float64]:
    if len(time) < 2:
        return xy[left]
    u = share[:, None]
    before, after = xy[left], xy[left + 1]
    if method == "linear" or len(time) < 3:
        return before * (1 - u) + after * u
    slope = _slopes(time, xy)
    h00, h10 = 2 * u**3 - 3 * u**2 + 1, u**3 - 2 * u**2 + u
    h01, h11 = 3 * u**2 - 2 * u**3, u**3 - u**2
    w = width[:, None]
    return h00 * before + h10 * w * slope[left] + h01 * after + h11 * w * slope[left + 1]


def _slopes(time: NDArray[np.float64], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slope at every row of the parabola through it and its neighbours; exact for parabolas at any spacing."""
    width = np.diff(time)[:, None]
    chord = np.diff(xy, axis=0) / width
    inner = (width[1:] * chord[:-1] + width[:-1] * chord[1:]) / (width[1:] + width[:-1])
    first = chord[0] + width[0] * (chord[0] - chord[1]) / (width[0] + width[1])
    last = chord[-1] + width[-1] * (chord[-1] - chord[-2]) / (width[-1] + width[-2])
    return np.concatenate([first[None], inner, last[None]])


def dense_linear(xy: NDArray[np.float64], source_step: float, step: float) -> NDArray[np.float64]:
    """``xy`` [T, ...] with rows every ``source_step`` seconds, on a grid of ``step`` from the first row to the last."""
    last = (len(xy) - 1) * source_step
    at = np.arange(math.floor(last / step + 1e-9) + 1) * step / source_step
    left = np.clip(np.floor(at + 1e-9).astype(np.int64), 0, max(0, len(xy) - 2))
    share = np.clip(at - left, 0.0, 1.0).reshape(-1, *([1] * (xy.ndim - 1)))
    between: NDArray[np.float64] = xy[left] * (1 - share) + xy[np.minimum(left + 1, len(xy) - 1)] * share
    return between


def on_common_grid(tracks: TrackSet) -> bool:
    """Whether all agents are seen at the same times: no two times lie closer than three quarters of a step."""
    gaps = np.diff(np.unique(tracks.time))
    return not len(gaps) or float(gaps.min()) > 0.75 / tracks.hz


def in_unit(tracks: TrackSet, unit: str, *, metres_per_pixel: float | None = None) -> TrackSet:
    """Positions in metres, feet or yards; from pixels only with their size.

    Raises:
        UserError: an unknown unit, or pixels without ``metres_per_pixel``.
    """
    if unit == tracks.unit:
        return tracks
    scale = _metres(tracks.unit, tracks.name, metres_per_pixel) / _metres(unit, tracks.name, metres_per_pixel)
    return replace(tracks, xy=tracks.xy * scale, unit=unit)


def _metres(unit: str, name: str, metres_per_pixel: float | None) -> float:
    if unit == "px":
        if metres_per_pixel is None or metres_per_pixel <= 0:
            raise UserError(f"{name}: pixels and metres need metres_per_pixel, a number above 0")
        return metres_per_pixel
    if unit not in METRES:
        raise UserError(f"{name}: unknown unit {unit!r}; there are px, {', '.join(METRES)}")
    return METRES[unit]


def read_homography(path: str | Path) -> NDArray[np.float64]:
    """A 3 x 3 matrix from image to ground, three numbers per line, plain or gzip.

    Raises:
        UserError: another shape, or a matrix that cannot be inverted.
    """
    path = Path(path)
    blocks = [values for _, values in number_blocks(path, 3)]
    matrix = np.concatenate(blocks) if blocks else np.empty((0, 3))
    if matrix.shape != (3, 3):
        raise UserError(f"{path}:{len(matrix)}: a homography has 3 lines of 3 numbers, got {len(matrix)} lines")
    if abs(np.linalg.det(matrix / np.abs(matrix).max())) < 1e-15:
        raise UserError(f"{path}:1: the homography cannot be inverted")
    return matrix


def through_homography(
    tracks: TrackSet, matrix: NDArray[np.float64], *, rows_first: bool = False, unit: str = "m"
) -> TrackSet:
    """Image positions brought to the ground.

    Args:
        tracks: positions x (column) and y (row) of the image.
        matrix: from image to ground [3, 3].
        rows_first: the matrix counts (row, column), as those of ETH and UCY do.
        unit: of the ground.

    Raises:
        UserError: a position on the horizon, where the ground is infinitely far.
    """
    image = tracks.xy[:, ::-1] if rows_first else tracks.xy
    ground = image @ matrix[:, :2].T + matrix[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        xy = ground[:, :2] / ground[:, 2:]
    if not np.isfinite(xy).all():
        raise UserError(f"{tracks.name}: a position lies on the horizon of the homography")
    return replace(tracks, xy=xy, unit=unit)


def offence_to_right(
    tracks: TrackSet,
    direction: Literal["left", "right"] | None = None,
    *,
    field: tuple[float, float] = FIELD_YARDS,
) -> TrackSet:
    """An NFL play turned by half a circle, if need be, so that the offence moves towards larger x.

    Args:
        tracks: a play in yards from a corner of the field.
        direction: of the offence; by default told from who stands in front of whom when the play starts.
        field: length and width in the unit of the tracks.

    Raises:
        UserError: no direction, and the tracks do not say who is offence and defence.
    """
    if direction is None:
        first = tracks.time == tracks.time[0]
        kind = np.array(tracks.kind)[tracks.agent]
        offence, defence = (tracks.xy[first & (kind == side), 0] for side in ("offence", "defence"))
        if not len(offence) or not len(defence):
            raise UserError(f"{tracks.name}: who is offence is not known; say direction='left' or 'right'")
        direction = "right" if defence.mean() > offence.mean() else "left"
    return tracks if direction == "right" else replace(tracks, xy=np.array(field) - tracks.xy)
