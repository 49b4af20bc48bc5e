"""Reading tracks from a file of any known format, which is told from the content."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurocl.data.npz import npz_names, read_npz
from neurocl.errors import UserError
from neurocl.trajectory import readers_pedestrians as pedestrians
from neurocl.trajectory import readers_sports as sports
from neurocl.trajectory.resample import read_homography, through_homography
from neurocl.trajectory.rows import (
    MAX_ROWS,
    RowGroups,
    Rows,
    agent_label,
    head,
    mistake,
    number_in,
    opened,
    text_lines,
    too_many_rows,
    whole_in,
)
from neurocl.trajectory.scenes import KINDS, TrackSet

MAX_JSON_BYTES = 1 << 28  # of a JSON file that has to be held at once
UNITS = ("m", "px", "ft", "yd")

# What the columns of a plain table may be called, the first that is there wins; ``columns=`` says otherwise.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "recording": ("recording", "scene", "sequence", "scene_id"),
    "frame": ("frame", "frame_id", "frameid", "frame_number", "frame_num"),
    "time": ("time", "t", "seconds", "timestamp"),
    "agent": ("agent", "agent_id", "id", "track", "track_id", "trackid", "ped", "ped_id", "pedestrian"),
    "x": ("x", "x_m", "pos_x", "x_px", "x_ft", "x_yd", "x_metres", "x_meters"),
    "y": ("y", "y_m", "pos_y", "y_px", "y_ft", "y_yd", "y_metres", "y_meters"),
    "kind": ("kind", "type", "class", "label"),
    "unit": ("unit",),
    "hz": ("hz",),
}


@dataclass(frozen=True)
class Format:
    """A file format: what it is in one line, and its reader ``(path, name, hz=, unit=) -> recordings``."""

    summary: str
    read: Callable[..., list[TrackSet]]


def read_table(
    path: Path,
    name: str,
    *,
    hz: float | None = None,
    unit: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[TrackSet]:
    """A table with a header line, cells separated by commas, semicolons or tabs.

    ``columns`` maps what is wanted (agent, x, y, frame or time; recording, kind, unit, hz if there) to the file's own
    column names; what it leaves out is looked for under the usual names.
    """
    source = text_lines(path)
    first, header = next(source)
    delimiter = next((mark for mark in ("\t", ";", ",") if mark in header), ",")
    names = [cell.strip() for cell in pedestrians.split_line(path, first, header, delimiter)]
    places = _columns(path, first, names, columns or {})
    # Beside frame numbers, a time of unknown unit is not trusted; tables that state their rate mean seconds.
    timed = "time" in places and ("frame" not in places or "hz" in places)
    groups = RowGroups(path)
    facts: dict[str, tuple[str, float | None]] = {}
    for line, text in source:
        cells = pedestrians.split_line(path, line, text, delimiter)
        if len(cells) != len(names):
            raise mistake(path, line, f"{len(cells)} columns where {len(names)} belong")
        recording = cells[places["recording"]].strip() if "recording" in places else name
        if recording not in facts:
            facts[recording] = (
                cells[places["unit"]].strip() if "unit" in places else _unit_of(names[places["x"]]),
                number_in(path, line, cells[places["hz"]], "a rate") if "hz" in places else None,
            )
        kind = cells[places["kind"]].strip().lower() if "kind" in places else "pedestrian"
        groups.of(recording, line).add(
            line,
            agent_label(cells[places["agent"]]),
            number_in(path, line, cells[places["x"]]),
            number_in(path, line, cells[places["y"]]),
            kind if kind in KINDS else "other",
            frame=whole_in(path, line, cells[places["frame"]], "a frame number") if "frame" in places else None,
            time=number_in(path, line, cells[places["time"]], "a time in seconds") if timed else None,
        )

    def finish(rows: Rows) -> TrackSet:
        own_unit, own_hz = facts[rows.name]
        rate = hz or own_hz
        if not timed and rate is None:
            rate = pedestrians.PEDESTRIAN_HZ
        return rows.finished(unit=_checked_unit(path, unit or own_unit), hz=rate)

    return groups.finished(finish)


def _columns(path: Path, line: int, names: list[str], chosen: Mapping[str, str]) -> dict[str, int]:
    unknown = set(chosen) - set(COLUMN_NAMES)
    if unknown:
        raise UserError(f"no such column role {sorted(unknown)[0]!r}; there are {', '.join(COLUMN_NAMES)}")
    lower = [name.lower() for name in names]
    places: dict[str, int] = {}
    for role, usual in COLUMN_NAMES.items():
        if role in chosen:
            if chosen[role] not in names:
                raise mistake(path, line, f"no column {chosen[role]} (there are {', '.join(names[:12])})")
            places[role] = names.index(chosen[role])
        elif not (role == "frame" and "time" in chosen):
            found = [lower.index(name) for name in usual if name in lower]
            if found:
                places[role] = found[0]
    missing = [role for role in ("agent", "x", "y") if role not in places]
    if "frame" not in places and "time" not in places:
        missing.insert(0, "frame or time")
    if missing:
        raise mistake(
            path, line, f"no column for {missing[0]}; name it in the column map (columns: {', '.join(names)})"
        )
    return places


def _unit_of(column: str) -> str:
    ending = column.lower().rpartition("_")[2]
    return ending if ending in UNITS else "m"


def _checked_unit(path: Path, unit: str) -> str:
    if unit not in UNITS:
        raise UserError(f"{path}: unknown unit {unit!r}; there are {', '.join(UNITS)}")
    return unit


def read_json(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """``{agent: [[t, x, y], ...]}`` with seconds and metres, or what :mod:`neurocl.trajectory.writers` writes."""
    with opened(path) as stream:
        raw = stream.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise mistake(path, 1, f"a JSON file of more than {MAX_JSON_BYTES >> 20} MiB; use csv or ndjson")
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise mistake(path, error.lineno, f"not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise mistake(path, 1, f"not JSON ({error})") from error
    if not isinstance(content, dict) or not content:
        raise mistake(path, 1, "a JSON object {agent: [[t, x, y], ...]} belongs here")
    entries = content.get("recordings")
    if not isinstance(entries, list):
        entries = [{"tracks": content}]
    if not entries:
        raise mistake(path, 1, "no recordings in the file")
    return [_json_recording(path, name, entry, hz, unit) for entry in entries]


def _json_recording(path: Path, name: str, entry: Any, hz: float | None, unit: str | None) -> TrackSet:
    if not isinstance(entry, dict) or not isinstance(entry.get("tracks"), dict):
        raise mistake(path, 1, "a recording without tracks")
    title = str(entry.get("name", name))
    given = entry.get("kind")
    kinds = given if isinstance(given, dict) else {}
    rows = Rows(path, title)
    numbered = False
    for agent, points in entry["tracks"].items():
        if not isinstance(points, list):
            raise mistake(path, 1, f"agent {agent}: a list of [t, x, y] belongs here")
        for index, point in enumerate(points):
            if not isinstance(point, list) or len(point) not in (3, 4):
                raise mistake(path, 1, f"agent {agent}, point {index}: [t, x, y] belongs here")
            if len(rows) and numbered != (len(point) == 4):
                raise mistake(path, 1, f"agent {agent}, point {index}: frame numbers must be everywhere or nowhere")
            numbered = len(point) == 4
            try:
                time, x, y = (number_in(path, 1, value) for value in point[:3])
                frame = whole_in(path, 1, point[3], "a frame number") if numbered else None
            except UserError as error:
                raise mistake(path, 1, f"agent {agent}, point {index}: {str(error).split(': ', 1)[-1]}") from error
            kind = str(kinds.get(agent, "pedestrian"))
            rows.add(index, agent, x, y, kind if kind in KINDS else "other", frame=frame, time=time)
            if len(rows) > MAX_ROWS:
                raise too_many_rows(path, 1)
    own_hz = number_in(path, 1, entry["hz"], "a rate") if entry.get("hz") is not None else None
    return rows.finished(unit=_checked_unit(path, unit or str(entry.get("unit", "m"))), hz=hz or own_hz)


NPZ_ARRAYS = ("name", "start", "agent_start", "time", "agent", "xy", "frame", "agent_name", "kind", "unit", "hz")


def read_track_npz(path: Path, name: str, *, hz: float | None = None, unit: str | None = None) -> list[TrackSet]:
    """The npz of :mod:`neurocl.trajectory.writers`, or an NBA or NFL npz with ``delta_xy``."""
    if "delta_xy" in npz_names(path):
        return sports.read_matches(path, name, hz=hz, unit=unit)
    values = read_npz(path, NPZ_ARRAYS)
    start, agents = values["start"], values["agent_start"]
    recordings = len(values["name"])
    sizes = [len(values[key]) for key in ("time", "agent", "xy", "frame")]
    fits = len(start) == len(agents) == recordings + 1 and len(values["unit"]) == len(values["hz"]) == recordings
    fits = fits and recordings > 0 and len(set(sizes)) == 1 and start[0] == agents[0] == 0
    fits = fits and start[-1] == sizes[0] and agents[-1] == len(values["agent_name"]) == len(values["kind"])
    if not fits or (np.diff(start) < 0).any() or (np.diff(agents) < 0).any():
        raise UserError(f"{path}: the arrays of the recordings do not fit together")
    if sizes[0] > MAX_ROWS:
        raise UserError(f"{path}: more than {MAX_ROWS} rows; cut the file into several")
    found = []
    for index in range(recordings):
        rows = slice(int(start[index]), int(start[index + 1]))
        people = slice(int(agents[index]), int(agents[index + 1]))
        agent = values["agent"][rows].astype(np.int64)
        if not np.isfinite(values["xy"][rows]).all() or not np.isfinite(values["time"][rows]).all():
            raise UserError(f"{path}: recording {index} holds values that are not finite numbers")
        if len(agent) and not 0 <= agent.min() <= agent.max() < people.stop - people.start:
            raise UserError(f"{path}: recording {index} has rows of agents that are not named")
        rate, time = float(values["hz"][index]), values["time"][rows].astype(np.float64)
        found.append(
            TrackSet(
                name=str(values["name"][index]),
                time=time * (rate / hz) if hz else time,
                agent=agent,
                xy=values["xy"][rows].astype(np.float64),
                agent_names=tuple(str(label) for label in values["agent_name"][people]),
                kind=tuple(str(kind) if str(kind) in KINDS else "other" for kind in values["kind"][people]),
                unit=_checked_unit(path, unit or str(values["unit"][index])),
                hz=hz or rate,
                frame=values["frame"][rows].astype(np.int64),
            )
        )
    return found


FORMATS: dict[str, Format] = {
    "eth-text": Format("frame agent x y (ETH/UCY and alike)", pedestrians.read_four_columns),
    "obsmat": Format("frame agent x z y vx vz vy (ETH annotation)", pedestrians.read_obsmat),
    "vsp": Format("UCY spline points", pedestrians.read_vsp),
    "sdd": Format("Stanford Drone annotations.txt", pedestrians.read_sdd),
    "trajnet-csv": Format("split,scene,track,frame,x_px,y_px (Stanford Drone)", pedestrians.read_trajnet_table),
    "ndjson": Format("TrajNet++ JSON lines", pedestrians.read_ndjson),
    "socialvae": Format("frame agent x y GROUP (SocialVAE)", sports.read_socialvae),
    "sportvu": Format("SportVU JSON of an NBA game", sports.read_sportvu),
    "npy": Format("array [recordings, T, A, 2] (LED)", sports.read_npy),
    "npz": Format("named arrays: neurocl tracks, NBA sequences or NFL plays", read_track_npz),
    "bdb": Format("NFL Big Data Bowl csv, any year", sports.read_big_data_bowl),
    "ngs": Format("NFL Next Gen Stats tsv", sports.read_next_gen_stats),
    "csv": Format("a table with a header", read_table),
    "json": Format("{agent: [[t, x, y], ...]}", read_json),
}


def detect_format(path: Path) -> str:
    """The name of a file's format in :data:`FORMATS`, from its first bytes.

    Raises:
        UserError: unreadable, empty, not text, or nothing that is known.
    """
    start = head(path)
    if start.startswith(b"PK"):
        return "npz"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    line, first = next(text_lines(path)) if not _is_json(start) else (1, "")
    if _is_json(start):
        text = start.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
        opening = text.splitlines()[0]
        try:
            entry = json.loads(opening)
            if isinstance(entry, dict) and entry and set(entry) <= {"scene", "track"}:
                return "ndjson"
        except ValueError:
            # A line that is cut or broken: the reader says where.
            if opening.replace(" ", "").startswith(('{"scene":{', '{"track":{')):
                return "ndjson"
        return "sportvu" if '"events"' in text and '"recordings"' not in text else "json"
    if "splines" in first:
        return "vsp"
    cells = first.replace(",", " ").split()
    if not _is_number(cells[0].strip('"')):
        return _table_format(path, line, first)
    widths = {4: "eth-text", 5: "socialvae", 8: "obsmat", 10: "sdd"}
    if len(cells) < 10 and len(cells) not in widths:
        raise mistake(
            path,
            line,
            f"{len(cells)} columns of numbers; 4 are frame agent x y, 5 end with a group, 8 are obsmat, 10 are SDD",
        )
    return widths.get(len(cells), "sdd")


def _is_json(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table_format(path: Path, line: int, first: str) -> str:
    names = {cell.strip().strip('"') for cell in first.replace("\t", ",").replace(";", ",").split(",")}
    if {"nflId", "possessionFlag", "frame"} <= names and "\t" in first:
        return "ngs"
    if "nflId" in names and names & {"frame.id", "frameId"}:
        return "bdb"
    if {"scene", "track", "frame", "x_px", "y_px"} <= names:
        return "trajnet-csv"
    if len(names) < 3:
        raise mistake(path, line, "no known format; a table of tracks starts with frame, agent, x and y")
    return "csv"


def read_recordings(
    path: str | Path,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    hz: float | None = None,
    unit: str | None = None,
    homography: str | Path | None = None,
) -> list[TrackSet]:
    """All recordings of a file: scenes, sequences or plays, often just one.

    Args:
        path: the file, plain or gzip.
        format: a name in :data:`FORMATS`; told from the content if not given.
        columns: for tables, see :func:`read_table`.
        hz: rows of one agent per second, where the file does not say it or says it wrong.
        unit: of the positions, in the same case.
        homography: file with a 3 x 3 matrix from image to ground; positions come out in metres.

    Raises:
        UserError: what is wrong, as ``FILE:LINE: ...``.
    """
    path = Path(path)
    if hz is not None and not (hz > 0 and np.isfinite(hz)):
        raise UserError(f"hz must be above 0, got {hz}")
    name = recording_name(path)
    chosen = format or ("csv" if columns else detect_format(path))
    if chosen not in FORMATS:
        raise UserError(f"unknown format {chosen!r}; there are {', '.join(FORMATS)}")
    if unit is not None:
        _checked_unit(path, unit)
    if chosen == "csv":
        found = read_table(path, name, hz=hz, unit=unit, columns=columns)
    else:
        if not path.exists() or format:
            head(path)
        found = FORMATS[chosen].read(path, name, hz=hz, unit=unit)
    if homography is not None:
        matrix = read_homography(homography)
        # The UCY and ETH matrices count rows of the image first.
        found = [through_homography(tracks, matrix, rows_first=chosen == "vsp") for tracks in found]
    return found


def read_tracks(
    path: str | Path,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    recording: str | None = None,
    hz: float | None = None,
    unit: str | None = None,
    homography: str | Path | None = None,
) -> TrackSet:
    """The one recording of a file; see :func:`read_recordings` for the arguments.

    The overlapping scenes of a TrajNet++ file are put together again.

    Args:
        recording: which one, if there are several: its name, or what follows the file's name in it.

    Raises:
        UserError: what is wrong with the file; several recordings and none chosen, or no such recording.
    """
    path = Path(path)
    if recording is None and (format or ("csv" if columns else detect_format(path))) == "ndjson":
        whole = pedestrians.read_ndjson(path, recording_name(path), hz=hz, unit=unit, scenes=False)[0]
        return whole if homography is None else through_homography(whole, read_homography(homography))
    found = read_recordings(path, format, columns, hz=hz, unit=unit, homography=homography)
    if recording is not None:
        prefix = f"{recording_name(path)}:"
        chosen = [tracks for tracks in found if recording in (tracks.name, tracks.name.removeprefix(prefix))]
        if chosen:
            return chosen[0]
    elif len(found) == 1:
        return found[0]
    names = ", ".join(tracks.name for tracks in found[:3]) + (", ..." if len(found) > 3 else "")
    asked = "choose one" if recording is None else f"none is called {recording!r}"
    raise UserError(f"{path}: {len(found)} recordings ({names}); {asked}")


def recording_name(path: Path) -> str:
    """The file name without folder, ``.gz`` and one more ending."""
    name = path.name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] if "." in name.lstrip(".") else name
