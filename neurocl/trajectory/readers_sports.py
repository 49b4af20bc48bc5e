"""Files of matches: NBA npz, npy, SocialVAE text and SportVU JSON; NFL npz, Big Data Bowl csv and Next Gen Stats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from neurocl.data.npz import npz_names, read_npz
from neurocl.errors import UserError
from neurocl.trajectory.readers_pedestrians import PEDESTRIAN_HZ, split_line
from neurocl.trajectory.rows import (
    MAX_BYTES,
    MAX_ROWS,
    RowGroups,
    Rows,
    agent_label,
    mistake,
    number_in,
    opened,
    text_lines,
    too_many_rows,
    usual_step,
    whole_in,
)
from neurocl.trajectory.scenes import TrackSet

NBA_FRAMES_PER_SECOND = 100.0  # frames of NBA recordings are hundredths of a second
NBA_STEP = 12
NBA_KINDS = ("home",) * 5 + ("visitor",) * 5 + ("ball",)
NFL_HZ = 10.0
NFL_KINDS = ("offence",) * 11 + ("defence",) * 11 + ("ball",)
LED_HZ = 5.0
SPORTVU_AGENTS = 11
QUARTER_SECONDS = 1000  # longer than any quarter, so that the quarters follow each other in the frame numbers
CHUNK = 1 << 20


@dataclass(frozen=True)
class Matches:
    """Sequences in which everybody is there all the time, one after the other.

    Attributes:
        xy: positions in feet or yards, float64 [rows, A, 2].
        start: first row of each sequence, and the end, int64 [sequences + 1].
        agent_id: the source's numbers, int64 [sequences, A].
        names: of the sequences.
        kind: of the A agents, the same in all sequences.
        unit: ``ft`` or ``yd``.
        snap: row of the snap in each play (NFL), else zeros.
    """

    xy: NDArray[np.float64]
    start: NDArray[np.int64]
    agent_id: NDArray[np.int64]
    names: tuple[str, ...]
    kind: tuple[str, ...]
    unit: str
    snap: NDArray[np.int64]


def load_matches(path: Path, name: str) -> Matches:
    """The integer npz files of NBA sequences and NFL plays: first differences in hundredths of a foot or yard.

    Raises:
        UserError: missing arrays or arrays that do not fit together.
    """
    present = npz_names(path)
    football = "snap" in present
    extra = ["play", "snap"] if football else ["quarter", "clock"]
    arrays = read_npz(path, ["delta_xy", "start", "agent_id", "game", *extra])
    delta, start, agent_id = arrays["delta_xy"], arrays["start"].astype(np.int64), arrays["agent_id"].astype(np.int64)
    kind = NFL_KINDS if football else NBA_KINDS
    sequences = len(start) - 1
    fits = delta.ndim == 3 and delta.shape[1:] == (len(kind), 2) and delta.dtype.kind == "i" and start.ndim == 1
    fits = fits and sequences >= 1 and start[0] == 0 and start[-1] == len(delta) and bool((np.diff(start) > 0).all())
    fits = fits and agent_id.shape == (sequences, len(kind))
    fits = fits and all(len(arrays[key]) == sequences for key in ("game", *extra))
    if not fits:
        raise UserError(f"{path}: delta_xy, start and agent_id do not fit together")
    total = np.cumsum(delta, axis=0, dtype=np.int64)
    # Every sequence starts with an absolute row, so what the sum held before it has to go.
    before = np.concatenate([np.zeros((1, *total.shape[1:]), dtype=np.int64), total])[start[:-1]]
    xy = (total - np.repeat(before, np.diff(start), axis=0)) / 100.0
    if football:
        labels = [f"{game}-{play}" for game, play in zip(arrays["game"], arrays["play"], strict=True)]
    else:
        labels = [
            f"{game}-q{quarter}-{clock[0]:.2f}"
            for game, quarter, clock in zip(arrays["game"], arrays["quarter"], arrays["clock"], strict=True)
        ]
    return Matches(
        xy=xy,
        start=start,
        agent_id=agent_id,
        names=tuple(f"{name}:{label}" for label in labels),
        kind=kind,
        unit="yd" if football else "ft",
        snap=arrays["snap"].astype(np.int64) if football else np.zeros(sequences, dtype=np.int64),
    )


def read_matches(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """The NBA and NFL npz files of :func:`load_matches`, one recording per sequence or play."""
    matches = load_matches(path, name)
    if matches.xy.shape[0] * matches.xy.shape[1] > MAX_ROWS:
        raise too_many_rows(path, 1)
    football = matches.unit == "yd"
    step, per_second = (1, NFL_HZ) if football else (NBA_STEP, NBA_FRAMES_PER_SECOND)
    return [
        dense_recording(
            title,
            matches.xy[first:last],
            tuple("ball" if kind == "ball" else str(agent) for agent, kind in zip(agents, matches.kind, strict=True)),
            matches.kind,
            unit=unit or matches.unit,
            step=step,
            frames_per_second=hz * step if hz else per_second,
        )
        for title, first, last, agents in zip(
            matches.names, matches.start[:-1], matches.start[1:], matches.agent_id, strict=True
        )
    ]


def dense_recording(
    name: str,
    xy: NDArray[np.float64],
    agent_names: tuple[str, ...],
    kind: tuple[str, ...],
    *,
    unit: str,
    step: int,
    frames_per_second: float,
) -> TrackSet:
    """A recording in which all agents have all rows: ``xy`` [T, A, 2], every ``step`` frames."""
    length, agents = xy.shape[:2]
    frame = np.repeat(np.arange(length, dtype=np.int64) * step, agents)
    return TrackSet(
        name=name,
        time=frame / frames_per_second,
        agent=np.tile(np.arange(agents, dtype=np.int64), length),
        xy=np.asarray(xy, dtype=np.float64).reshape(-1, 2),
        agent_names=agent_names,
        kind=kind,
        unit=unit,
        hz=frames_per_second / step,
        frame=frame,
    )


def read_npy(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """An array [recordings, T, A, 2], as LED uses for the NBA (11 agents: feet, 5 Hz, the ball last); no pickles."""
    with opened(path) as stream:
        try:
            version = npy.read_magic(stream)
            shape, _, dtype = (
                npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
            )
        except (ValueError, EOFError, SyntaxError, TokenError) as error:
            raise UserError(f"{path}: a damaged npy file ({error})") from error
        if dtype.hasobject:
            raise UserError(f"{path}: the array holds Python objects; neurocl reads no pickles")
        if len(shape) != 4 or shape[3] != 2 or 0 in shape or dtype.kind not in "fiu":
            raise UserError(f"{path}: numbers of shape [recordings, steps, agents, 2] belong here, got {dtype} {shape}")
        if shape[0] * shape[1] * shape[2] > MAX_ROWS:
            raise UserError(f"{path}: more than {MAX_ROWS} rows; cut the file into several")
        stream.seek(0)
        try:
            values = npy.read_array(stream, allow_pickle=False).astype(np.float64)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: a damaged npy file ({error})") from error
    broken = np.argwhere(~np.isfinite(values))
    if len(broken):
        raise UserError(f"{path}: not a finite number at index {broken[0].tolist()}")
    agents = shape[2]
    basketball = agents == len(NBA_KINDS)
    names = tuple("ball" if basketball and agent == agents - 1 else str(agent) for agent in range(agents))
    return [
        dense_recording(
            f"{name}:{index}",
            recording,
            names,
            NBA_KINDS if basketball else ("other",) * agents,
            unit=unit or ("ft" if basketball else "m"),
            step=1,
            frames_per_second=hz or LED_HZ,
        )
        for index, recording in enumerate(values)
    ]


def read_socialvae(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """``frame agent x y GROUP`` per line. With PLAYER and BALL: feet, frames in hundredths of a second; else metres."""
    rows = Rows(path, name)
    sport = False
    for line, text in text_lines(path):
        cells = text.split()
        if len(cells) != 5:
            raise mistake(path, line, f"{len(cells)} columns where 5 belong")
        group = cells[4].upper()
        sport = sport or group in ("PLAYER", "BALL")
        agent = "ball" if group == "BALL" else agent_label(cells[1])
        kind = "ball" if group == "BALL" else "other" if group == "PLAYER" else "pedestrian"
        x, y = number_in(path, line, cells[2]), number_in(path, line, cells[3])
        rows.add(line, agent, x, y, kind, frame=whole_in(path, line, cells[0], "a frame number"))
        if len(rows) > MAX_ROWS:
            raise too_many_rows(path, line)
    if sport:
        return [rows.finished(unit=unit or "ft", hz=hz, frames_per_second=None if hz else NBA_FRAMES_PER_SECOND)]
    return [rows.finished(unit=unit or "m", hz=hz or PEDESTRIAN_HZ)]


def read_sportvu(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """SportVU: events of moments ``[quarter, ms, game clock, shot clock, null, [[team, player, x, y, z], ...]]``, feet.

    Events overlap, so a moment counts once per quarter and clock; moments without ten players and the ball are skipped.
    A new recording starts with every quarter and wherever the clock jumps. Time is the time since the quarter began to
    be recorded, frames are hundredths of a second. Message lines are numbers of events.
    """
    moments: dict[tuple[int, int], tuple[int, list[Any]]] = {}
    teams: dict[int, str] = {}
    for number, event in _events(path):
        for side in ("home", "visitor"):
            team = event.get(side)
            if isinstance(team, dict) and "teamid" in team:
                teams[whole_in(path, number, team["teamid"], "a team id")] = side
        for moment in event.get("moments") or []:
            if not isinstance(moment, list) or len(moment) < 6 or not isinstance(moment[5], list):
                raise mistake(path, number, "a moment that is not [quarter, ms, clock, shot clock, null, positions]")
            if len(moment[5]) != SPORTVU_AGENTS or moment[2] is None:
                continue
            quarter = whole_in(path, number, moment[0], "a quarter")
            clock = round(number_in(path, number, moment[2], "a game clock") * NBA_FRAMES_PER_SECOND)
            moments.setdefault((quarter, -clock), (number, moment[5]))
            if len(moments) * SPORTVU_AGENTS > MAX_ROWS:
                raise too_many_rows(path, number)
    if not moments:
        raise mistake(path, 1, "no moment with ten players and the ball")
    keys = sorted(moments)
    origin = keys[0][1]
    frames = np.array([(quarter - keys[0][0]) * QUARTER_SECONDS * 100 + clock - origin for quarter, clock in keys])
    step = usual_step(frames, np.zeros(len(frames), dtype=np.int64))
    recordings = []
    bounds = [0, *(np.flatnonzero(np.diff(frames) > 2.5 * step) + 1), len(frames)]
    for index, (first, last) in enumerate(itertools.pairwise(bounds)):
        rows = Rows(path, f"{name}:{index}")
        for key, frame in zip(keys[first:last], frames[first:last], strict=True):
            number, positions = moments[key]
            for row in positions:
                if not isinstance(row, list) or len(row) < 4:
                    raise mistake(path, number, "a position that is not [team, player, x, y, z]")
                team, player = (whole_in(path, number, value, "an id") for value in row[:2])
                kind = "ball" if team == -1 else teams.get(team, "other")
                x, y = number_in(path, number, row[2]), number_in(path, number, row[3])
                rows.add(number, "ball" if team == -1 else str(player), x, y, kind, frame=int(frame))
        recordings.append(rows.finished(unit=unit or "ft", hz=hz or NBA_FRAMES_PER_SECOND / step))
    return recordings


def _events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of a SportVU file, one at a time: a whole match would take gigabytes as Python objects."""
    decoder = json.JSONDecoder()
    with opened(path) as stream:
        pending = stream.read(CHUNK).decode("utf-8", errors="replace")
        place = pending.find('"events"')
        place = pending.find("[", place) + 1 if place >= 0 else 0
        if not place:
            raise mistake(path, 1, 'no list of "events"')
        read, number = len(pending), 1
        while True:
            while place < len(pending) and pending[place] in " \t\r\n,":
                place += 1
            try:
                if pending[place : place + 1] == "]":
                    return
                event, place = decoder.raw_decode(pending, place)
            except ValueError as error:
                # The event may go on in what was not read yet.
                more = stream.read(max(CHUNK, len(pending) - place))
                read += len(more)
                if not more:
                    raise mistake(path, number, f"event {number} is cut or damaged ({error})") from error
                if read > MAX_BYTES:
                    raise mistake(path, number, f"at most {MAX_BYTES / 2**30:.1f} GiB are read") from error
                pending, place = pending[place:] + more.decode("utf-8", errors="replace"), 0
                continue
            if not isinstance(event, dict):
                raise mistake(path, number, f"event {number} is not a JSON object")
            yield number, event
            number += 1


@dataclass(frozen=True)
class _Columns:
    """Which column of a tracking table holds what."""

    names: tuple[str, ...]
    places: dict[str, int]

    def cell(self, cells: list[str], name: str) -> str:
        return cells[self.places[name]].strip()


def _header(path: Path, source: Iterator[tuple[int, str]], delimiter: str, wanted: dict[str, str]) -> _Columns:
    line, text = next(source)
    names = [cell.strip() for cell in split_line(path, line, text, delimiter)]
    missing = [column for column in wanted.values() if column not in names]
    if missing:
        raise mistake(path, line, f"no column {missing[0]} (there are {', '.join(names[:12])})")
    return _Columns(tuple(names), {key: names.index(column) for key, column in wanted.items()})


def read_big_data_bowl(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """NFL Big Data Bowl tables of any year: one recording ``name:game-play`` per play, yards at 10 Hz.

    2017 to 2019 name the frame ``frame.id``, later ``frameId``; the side is ``team`` or ``club``. The ball has no
    nflId, or is called football. Clubs without a side (``TB``) are of kind other. Rows repeated for a second event of
    the same frame count once.
    """
    source = text_lines(path)
    first = next(text_lines(path))[1]
    old, club = "frame.id" in first, "club" in first.split(",")
    wanted = {"game": "gameId", "play": "playId", "agent": "nflId", "frame": "frame.id" if old else "frameId"}
    wanted |= {"side": "club" if club else "team", "title": "displayName", "x": "x", "y": "y"}
    columns = _header(path, source, ",", wanted)
    kinds = {"home": "home", "away": "visitor", "ball": "ball", "football": "ball"}
    groups = RowGroups(path)
    for line, text in source:
        cells = split_line(path, line, text, ",")
        if len(cells) != len(columns.names):
            raise mistake(path, line, f"{len(cells)} columns where {len(columns.names)} belong")
        agent, side = columns.cell(cells, "agent"), columns.cell(cells, "side").lower()
        ball = side in ("ball", "football") or columns.cell(cells, "title").lower() in ("ball", "football")
        if not ball and agent in ("", "NA"):
            raise mistake(path, line, "a player without nflId")
        play = f"{name}:{columns.cell(cells, 'game')}-{columns.cell(cells, 'play')}"
        groups.of(play, line).add(
            line,
            "ball" if ball else agent_label(agent),
            number_in(path, line, columns.cell(cells, "x")),
            number_in(path, line, columns.cell(cells, "y")),
            "ball" if ball else kinds.get(side, "other"),
            frame=whole_in(path, line, columns.cell(cells, "frame"), "a frame number"),
        )
    return groups.finished(
        lambda rows: rows.finished(unit=unit or "yd", frames_per_second=hz or NFL_HZ, drop_repeats=True)
    )


def read_next_gen_stats(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """Next Gen Stats plays: tabs, several rows per frame when several events happen, possession tells the sides.

    One recording ``name:game-play`` per play, yards at 10 Hz. Rows of a player without a position (not yet on the
    field) are left out, repeated ones count once.
    """
    source = text_lines(path)
    wanted = {"game": "gameId", "play": "playId", "side": "possessionFlag", "frame": "frame", "agent": "nflId"}
    columns = _header(path, source, "\t", wanted | {"title": "displayName", "x": "x", "y": "y"})
    groups = RowGroups(path)
    for line, text in source:
        cells = split_line(path, line, text, "\t") if text.count("\t") + 1 != len(columns.names) else text.split("\t")
        if len(cells) != len(columns.names):
            raise mistake(path, line, f"{len(cells)} columns where {len(columns.names)} belong")
        x, y = columns.cell(cells, "x"), columns.cell(cells, "y")
        if x in ("", "NA") or y in ("", "NA"):
            continue
        ball = columns.cell(cells, "title").lower() in ("ball", "football")
        agent, side = columns.cell(cells, "agent"), columns.cell(cells, "side")
        if not ball and agent in ("", "NA"):
            raise mistake(path, line, "a player without nflId")
        kind = "ball"
        if not ball:
            flag = number_in(path, line, side, "a possession flag") if side not in ("", "NA") else -1.0
            kind = {1.0: "offence", 0.0: "defence"}.get(flag, "other")
        play = f"{name}:{columns.cell(cells, 'game')}-{columns.cell(cells, 'play')}"
        groups.of(play, line).add(
            line,
            "ball" if ball else agent_label(agent),
            number_in(path, line, x),
            number_in(path, line, y),
            kind,
            frame=whole_in(path, line, columns.cell(cells, "frame"), "a frame number"),
        )
    return groups.finished(
        lambda rows: rows.finished(unit=unit or "yd", frames_per_second=hz or NFL_HZ, drop_repeats=True)
    )
